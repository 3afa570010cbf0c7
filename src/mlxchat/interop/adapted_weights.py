"""Weights on their way out of a checkpoint that holds adapters: those of its base, each fused when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlxchat.interop.tensor_files import StoredWeights
from mlxchat.interop.tensors import Floats
from mlxchat.model.sizes import GPTSizes


class AdaptedWeights(StoredWeights):
    """The tensors of the model that adapters and their base are together, one in memory at a time."""

    def __init__(self, chain: list[Path], sizes: GPTSizes) -> None:
        """Look into all folders.

        Args:
            chain: of the adapters, of what they rest on, and so on; the last has all weights.
            sizes: of the model.

        Raises:
            DataError: a file is missing or damaged, or does not fit the model.
        """
        # Only models with adapters need MLX to be written out.
        from mlxchat.model.lora import read_adapters

        super().__init__(chain[-1])
        self._adapters = [read_adapters(folder, sizes) for folder in reversed(chain[:-1])]

    def pieces(self, name: str) -> Iterator[Floats]:
        """Yield a tensor's numbers in order; of one with adapters, all at once."""
        changing = [adapters for adapters in self._adapters if adapters.changes(name)]
        if not changing:
            yield from super().pieces(name)
            return
        import mlx.core as mx

        value = mx.array(np.concatenate([*super().pieces(name)]).reshape(self.shapes[name]))
        for adapters in changing:
            value = adapters.on(name, value)
        yield np.asarray(value).reshape(-1)
