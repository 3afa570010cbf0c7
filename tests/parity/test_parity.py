"""mlxchat agrees with the values that nanochat's own code computed, except for the differences we document.

The comparisons are those of `check.py`, with the tolerances that the README of the values expects of float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from check import QUANTITIES, SUFFIXES, compare, open_file, show
from comparison import Comparison, Quantity
from parity_file import FOLDER, ParityFile

FILES = sorted(path for path in FOLDER.glob("*_*") if path.suffix in SUFFIXES) if FOLDER.is_dir() else []
ABSENT = pytest.mark.skip(reason="nanochat's values are missing; MLXCHAT_PARITY names their folder")


def cases() -> list[Any]:
    """Return a parameter for every quantity of every file."""
    found = [
        pytest.param(path, quantity, id=f"{path.stem}-{quantity.__name__}")
        for path in FILES
        for quantity in QUANTITIES.get(ParityFile(path).kind, ())
    ]
    return found or [pytest.param(None, None, id="absent", marks=ABSENT)]


@pytest.mark.parametrize(("path", "quantity"), cases())
def test_quantity_agrees_with_nanochat(path: Path, quantity: Quantity) -> None:
    lines = list(compare(open_file(path), quantity))
    assert [show(line) for line in lines if isinstance(line, Comparison) and not line.ok] == []


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name) for path in FILES] or [pytest.param(None, marks=ABSENT)]
)
def test_file_has_a_known_format(path: Path) -> None:
    assert QUANTITIES[open_file(path).kind]
