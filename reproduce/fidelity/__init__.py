"""Fidelity and scalability (paper D.1, Fig. 4): how close sketched scores are to exact ones, and what they cost.

One random looped GPT, one batch of random tokens, every example training example and query at once. Exact scores come
from recorded activations (:mod:`.tape`), sketches of every size, seed and hash family from the same record; the
library's own features are checked against it before anything is reported.
"""
