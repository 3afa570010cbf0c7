"""Optimisations of MLX for Linux CPUs; Macs and NVIDIA GPUs do not use them.

- `runtime`: OpenBLAS, malloc settings and compiler flags, applied before MLX's first import;
- `lanes`: a stream for each core;
- `kernels`: the operations of `mlxchat.ops` in few passes over memory, with memory-saving gradients;
- `decode`: a decoding step on all cores;
- `thin.cpp`: matrix products of few rows, for decoding.

`mlxchat.ops.device` decides whether they are used. Without this folder everything works, slower.
"""

from __future__ import annotations

import sys


class BeforeMLX:
    """Import hook that applies the remedy at the first import of MLX."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find nothing; load the BLAS if MLX is about to be imported."""
        if fullname == "mlx" or fullname.startswith("mlx."):
            sys.meta_path.remove(self)
            from mlxchat.cpu.runtime import apply_remedy

            apply_remedy()


def install_hook() -> None:
    """Install the hook that applies the remedy just before MLX is first imported."""
    if "mlx.core" not in sys.modules and not any(isinstance(finder, BeforeMLX) for finder in sys.meta_path):
        sys.meta_path.insert(0, BeforeMLX())
