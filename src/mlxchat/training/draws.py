"""Seeds of the many draws of one purpose."""

from __future__ import annotations

import numpy as np


def draw_seed(seed: int, number: int) -> int:
    """Return a seed for one of many draws."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
