"""Which example each element of a tensor belongs to: followed through the calls of a forward pass."""

from typing import Any

from stepinfluence.capture.owners.arithmetic import ARITHMETIC
from stepinfluence.capture.owners.follow import Follower as Follower
from stepinfluence.capture.owners.follow import Rule
from stepinfluence.capture.owners.indexing import INDEXING
from stepinfluence.capture.owners.intervals import Owners as Owners
from stepinfluence.capture.owners.intervals import meet as meet
from stepinfluence.capture.owners.products import PRODUCTS
from stepinfluence.capture.owners.structure import STRUCTURE

RULES: dict[Any, Rule] = {**ARITHMETIC, **PRODUCTS, **STRUCTURE, **INDEXING}
"""By torch function; what is not here, and is not written in Python on top of these, is not known."""
