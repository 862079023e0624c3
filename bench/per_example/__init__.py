"""This project against full per-example gradients: one linear layer, and looped models."""
