"""Scores as people look at them in a notebook: tables, and figures by matplotlib or plotly. Takes plain arrays."""
