"""Influence as a hint at a mechanism (paper section 4, D.2, Fig. 1): the automaton inside a looped parity transformer.

A model trained on strings of up to 20 bits, asked about alternating strings of 40: the influence of its training set
has a period, the logits and hidden states have it too, and four discrete states with a table do the model's work.
"""
