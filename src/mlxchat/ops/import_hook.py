"""Notice the first import of MLX, and until then cost next to nothing: verbs that only read must start at once."""

from __future__ import annotations

import sys


class BeforeMLX:
    """Applies the CPU remedy at the first import of MLX, wherever that happens, and then leaves the way."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find nothing; but if it is MLX that is looked for, load its BLAS first."""
        if fullname == "mlx" or fullname.startswith("mlx."):
            sys.meta_path.remove(self)
            from mlxchat.ops.blas import apply_remedy

            apply_remedy()


def install_hook() -> None:
    """Arrange that the remedy is applied just before MLX is first imported."""
    if "mlx.core" not in sys.modules and not any(isinstance(finder, BeforeMLX) for finder in sys.meta_path):
        sys.meta_path.insert(0, BeforeMLX())
