"""From per-example gradients to influence: features, scores, checkpoints, optimizer metrics, losses."""
