"""Which example each element of a tensor belongs to: followed through the calls of a forward pass."""

from typing import Any

from torch import Tensor

from stepinfluence.capture.owners.arithmetic import ARITHMETIC, BY_VALUE
from stepinfluence.capture.owners.follow import Follower as Follower
from stepinfluence.capture.owners.follow import Rule
from stepinfluence.capture.owners.indexing import INDEXING
from stepinfluence.capture.owners.intervals import Owners as Owners
from stepinfluence.capture.owners.intervals import meet as meet
from stepinfluence.capture.owners.memory import Memories as Memories
from stepinfluence.capture.owners.memory import Memory as Memory
from stepinfluence.capture.owners.products import PRODUCTS
from stepinfluence.capture.owners.structure import MANY, STRUCTURE

RULES: dict[Any, Rule] = {**ARITHMETIC, **PRODUCTS, **STRUCTURE, **INDEXING}
"""By torch function; what is not here, and is not written in Python on top of these, is not known."""

BY_SHAPE = {Tensor.__getitem__, *ARITHMETIC, *PRODUCTS, *STRUCTURE} - BY_VALUE
"""Functions whose rule goes by owners, shapes and arguments that are no tensors, whatever the tensors hold."""

ALONE = {Tensor.__getitem__, *(f for f, rule in STRUCTURE.items() if rule not in MANY)}
"""Those of them of which that is true with one tensor only: others would say where elements go."""
