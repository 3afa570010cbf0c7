"""Everything that makes MLX fast on a Linux CPU, and nothing that a Mac or an NVIDIA GPU uses.

- `runtime`: a fast BLAS, a calmer malloc and compiler flags, applied before MLX's first import;
- `lanes`: a stream for each core;
- `kernels`: the operations of `mlxchat.ops` in few passes over memory, with gradients that keep little;
- `decode`: a step of decoding on all cores;
- `thin.cpp`: its matrix products, which have few rows.

`mlxchat.ops.device` decides whether it is used. Without this folder everything works, slower.
"""

from __future__ import annotations

import sys


class BeforeMLX:
    """Applies the remedy at the first import of MLX, wherever that happens; until then it costs next to nothing."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find nothing; but load the BLAS first if MLX is imported."""
        if fullname == "mlx" or fullname.startswith("mlx."):
            sys.meta_path.remove(self)
            from mlxchat.cpu.runtime import apply_remedy

            apply_remedy()


def install_hook() -> None:
    """Apply the remedy just before MLX is first imported."""
    if "mlx.core" not in sys.modules and not any(isinstance(finder, BeforeMLX) for finder in sys.meta_path):
        sys.meta_path.insert(0, BeforeMLX())
