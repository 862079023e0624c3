"""Randomly generated looped models, held against batches of one by autograd: see ``python -m bench.fuzz --help``."""
