"""The comparisons of this folder, importable, and a CPU to make them on."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # as for `python tests/parity/check.py`
