"""Sudoku (paper D.3, D.4, Fig. 2, Table 1): when do test-time loops matter, and whose influence acts late?

A looped transformer with bidirectional attention is trained on the easier 80 % of a set of puzzles with a random number
of loop steps for each batch, and tested on the harder 20 % with fixed numbers of steps. Influence is computed between
subsets of both, at a fixed number of steps, over all checkpoints.
"""
