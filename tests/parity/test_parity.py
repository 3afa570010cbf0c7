"""mlxchat agrees with the values that nanochat's own code computed, or departs from them as we say.

The comparisons are those of `check.py`; their tolerances are what the values' own README expects of float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from check import QUANTITIES, SUFFIXES, compare, open_file, show
from comparison import Comparison, Quantity
from parity_file import FOLDER, ParityFile

FILES = sorted(path for path in FOLDER.glob("*_*") if path.suffix in SUFFIXES) if FOLDER.is_dir() else []
ABSENT = pytest.mark.skip(reason="nanochat's values are not here; MLXCHAT_PARITY says where they are")


def cases() -> list[Any]:
    """Return every quantity of every file."""
    found = [
        pytest.param(path, quantity, id=f"{path.stem}-{quantity.__name__}")
        for path in FILES
        for quantity in QUANTITIES.get(ParityFile(path).kind, ())
    ]
    return found or [pytest.param(None, None, id="absent", marks=ABSENT)]


@pytest.mark.parametrize(("path", "quantity"), cases())
def test_nanochats_values_are_met(path: Path, quantity: Quantity) -> None:
    lines = list(compare(open_file(path), quantity))
    assert [show(line) for line in lines if isinstance(line, Comparison) and not line.ok] == []


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name) for path in FILES] or [pytest.param(None, marks=ABSENT)]
)
def test_every_file_is_of_a_known_kind(path: Path) -> None:
    assert QUANTITIES[open_file(path).kind]
