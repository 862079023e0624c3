"""``sdi demo``: train a looped model, attribute its answers step by step, report."""
