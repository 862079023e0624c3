"""The uses of influence by step that docs/uses.md shows, over seeds."""
