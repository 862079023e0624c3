"""A run in a browser: the report of the demonstration, and the explorer of stores."""
