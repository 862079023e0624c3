"""Looped language model (paper D.5, Fig. 3): at which loop step does training text act on held-out text?

A recursive nanochat is trained on real text with truncated backpropagation; SDI is then computed with full
backpropagation at several loop counts. Variants that change one thing each ask what makes the profile: training,
truncation, or the way the state enters the loop.
"""
