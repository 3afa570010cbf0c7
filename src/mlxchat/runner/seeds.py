"""Seeds: all randomness of a run derives from one number."""

from __future__ import annotations

import hashlib


def stage_seed(root_seed: int, stage: str, purpose: str) -> int:
    """Return a seed for one purpose of a stage, in [0, 2^32): equal settings draw equal numbers."""
    return int.from_bytes(hashlib.sha256(f"{root_seed}/{stage}/{purpose}".encode()).digest()[:4], "big")
