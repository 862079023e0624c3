"""Experiment ``uses``: what a summary of the paper says influence by loop step is good for, each tried with a control.

Wrong examples that act at late steps only, probes at the step where influence peaks, and a curriculum by step profile,
on the planted tasks. Another use that it names, an audit trail, is ``sdi report --id`` (docs/explore.md).
"""
