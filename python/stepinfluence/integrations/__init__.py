"""Training loops and model hubs of others: save what influence needs while training, load looped models from a hub.

Each module needs its library, and nothing else does: :mod:`.huggingface` and :mod:`.pretrained` need transformers,
:mod:`.lightning` needs lightning.
"""
