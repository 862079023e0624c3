"""Tasks solved by an algorithm whose every step is known."""
