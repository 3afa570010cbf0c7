"""This machine's cores and device, and chunk sizes that bound memory. Imports no MLX, because plans use it."""

import importlib.metadata
import os
import sys
from contextlib import suppress

LOGITS = 1 << 26  # of a chunk, 256 MB in float32
CPU_LOGITS = 1 << 22  # of a chunk in `mlxchat.cpu`: few rows fit into the cache …
CPU_LEAST_LOGITS_ROWS = 256  # … but with fewer rows than this BLAS would spend its time packing the head
CPU_MOST_LANES = 16  # with more lanes each would have too few rows
# Rows of a KV cache: one of these, or a multiple of the last, so that few shapes are compiled.
BATCH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DECODED_ROWS = 64  # answers that are decoded together, at most
SCORED_TOKENS = 4096  # of a forward pass that scores, where nothing else is known
KEPT_TOKENS = 8192  # of earlier prompts, whose keys and values are kept for prefix reuse
KV_TOKENS = 256  # by which KV caches grow
PREFILL_TOKENS = 512  # per chunk of prefill


def round_up(count: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-int(count) // step) * step


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_kind(choice: str) -> str:
    """Return MLX's backend for `machine.device`: 'cpu', 'metal' or 'cuda'."""
    if choice == "cpu":
        return "cpu"
    if sys.platform == "darwin":
        return "metal"
    for package in ("mlx-cuda-12", "mlx-cuda-13"):
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            return "cuda"
    return "metal" if choice == "gpu" else "cpu"  # gpu: a plan for a Mac; a run here is refused


def dtype_name(device: str, compute_dtype: str) -> str:
    """Return 'float32' or 'bfloat16'; 'auto' is bfloat16 on a GPU, as CPUs are forty times slower in half precision."""
    if compute_dtype == "auto":
        return "float32" if device_kind(device) == "cpu" else "bfloat16"
    return compute_dtype
