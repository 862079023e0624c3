"""Experiment ``planted``: copy, addition, sorting and running parity, where the steps of the algorithm and the critical
training examples are known.

A summary of the paper (not the paper) claims correlations of 0.87, 0.89 and 0.62 of sketched SDI, exact SDI and classic
TracIn with ground-truth critical examples, and influence spikes exactly at the compare-swap step of a sorting task. It
gives no protocol; this is one, with planted ground truth, permutation tests and retraining.
"""
