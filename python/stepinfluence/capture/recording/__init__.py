"""From gradients at uses to rows of sketches: what waits for its layer's other steps, and what is formed first."""
