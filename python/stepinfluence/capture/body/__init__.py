"""The loop body and what runs through it: parameters and their views, steps, hooks, state, and the batches."""
