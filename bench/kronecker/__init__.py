"""Kronecker factors in place of the sketched Fisher: tried against retraining (``python -m bench.kronecker``)."""
