"""What the store tests share."""

from __future__ import annotations

import sys
from pathlib import Path

# Test folders are no packages: helpers are imported by their plain name, by forked writers too.
sys.path.insert(0, str(Path(__file__).parent))
