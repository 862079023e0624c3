"""Sketches of per-example gradients, computed during backpropagation.

The kernels behind Step-Decomposed Influence (arXiv 2602.10097): CountSketch for vectors, TensorSketch for the
outer-product gradients of linear layers and embeddings. Knows nothing of attribution; see ``stepinfluence`` for
that. Importing this package needs neither a GPU nor Triton.
"""

from sdi_kernels._version import __version__
from sdi_kernels.cpu.scan import row_products
from sdi_kernels.functional import (
    sketch_embedding_grads,
    sketch_linear_grads,
    sketch_matrix_grads,
    sketch_scaled_vector_grads,
    sketch_vector_grads,
)
from sdi_kernels.hashing import HASH_FAMILIES, HASH_FORMAT, HashFamily
from sdi_kernels.linear import sketched_linear
from sdi_kernels.pairwise import pairwise_linear_influence
from sdi_kernels.plan import LinearPlan, Route, plan_linear
from sdi_kernels.sketches import CountSketch, TensorSketch
from sdi_kernels.variance import variance_bound

__all__ = [
    "HASH_FAMILIES",
    "HASH_FORMAT",
    "CountSketch",
    "HashFamily",
    "LinearPlan",
    "Route",
    "TensorSketch",
    "__version__",
    "pairwise_linear_influence",
    "plan_linear",
    "row_products",
    "sketch_embedding_grads",
    "sketch_linear_grads",
    "sketch_matrix_grads",
    "sketch_scaled_vector_grads",
    "sketch_vector_grads",
    "sketched_linear",
    "variance_bound",
]
