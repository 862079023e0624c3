"""How parameters are used: every torch call of a forward pass is seen; rules say how to tap gradients there."""
