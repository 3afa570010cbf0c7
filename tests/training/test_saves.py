"""Saved states on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlxchat.training.state import read_newest, write_save


def test_arrays_come_back_in_the_shape_that_they_had(tmp_path: Path) -> None:
    # A count with an axis would make rows of what AdamW moves with it: a model of July 2026 has such scalars.
    arrays = {"count": np.float32(3), "row": np.arange(3.0), "turned": np.arange(6.0).reshape(2, 3).T}
    write_save(tmp_path, 1, {name: np.asarray(value) for name, value in arrays.items()}, {})
    found = read_newest(tmp_path)
    assert found is not None
    for name, value in arrays.items():
        assert found[0][name].shape == np.shape(value)
        assert (found[0][name] == value).all()
