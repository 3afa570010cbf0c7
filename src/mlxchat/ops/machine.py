"""What is known of this machine without MLX: plans and the threads that encode text import this alone."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from contextlib import suppress


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Return how many of this machine's cores each of some processes gets that compute at the same time."""
    return max(1, available_cores() // processes)


def device_kind(choice: str) -> str:
    """Return 'cpu', 'metal' or 'cuda': where MLX will compute under `machine.device`."""
    if choice == "cpu":
        return "cpu"
    if sys.platform == "darwin":
        return "metal"
    for package in ("mlx-cuda-12", "mlx-cuda-13"):
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            return "cuda"
    return "metal" if choice == "gpu" else "cpu"  # a plan for a Mac; a run here is refused


def dtype_name(device: str, compute_dtype: str) -> str:
    """Return 'float32' or 'bfloat16': what `machine.compute_dtype` means on `machine.device`.

    auto is bfloat16 on a GPU, and float32 on a CPU, where half precision is forty times slower.
    """
    if compute_dtype != "auto":
        return compute_dtype
    return "float32" if device != "gpu" and device_kind(device) == "cpu" else "bfloat16"
