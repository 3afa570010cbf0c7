"""The cores of this machine. Imports no MLX: plans and the threads that encode text need no more than a number."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Return how many of this machine's cores each of some processes gets that compute at the same time."""
    return max(1, available_cores() // processes)
