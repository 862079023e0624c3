"""What the capture gives, and what it costs, on looped models of many kinds."""
