"""Experiment ``error``: sketched influence where a summary of the paper doubts it, and where bounds can be held to it.

Deep loops (up to 128 steps), sparse gradients, checkpoints that share their hashes (Lemma 1, eq. 12) and nearly
orthogonal pairs, by hash family, on small looped models whose exact gradients of every step fit in memory.
"""
