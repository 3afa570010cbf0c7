"""Truncated or altered files are recognised and never used."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxchat.errors import StoreError
from mlxchat.store.manifest import parse_manifest, read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store
from mlxchat.training.state import read_newest, write_save


def truncations(data: bytes, step: int = 1) -> Iterator[bytes]:
    """Yield the data cut before every `step`-th byte."""
    return (data[:length] for length in range(0, len(data), step))


def flips(data: bytes, step: int = 1) -> Iterator[bytes]:
    """Yield the data with one bit flipped, for every `step`-th bit."""
    for bit in range(0, len(data) * 8, step):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        yield bytes(altered)


@pytest.fixture(scope="module")
def made(make_stubs: Callable[[], Any]) -> Any:
    """The stubs' pipeline, run once."""
    stubs = make_stubs()
    code, text = stubs.run()
    assert code == 0, text
    return stubs


@pytest.fixture
def folder(made: Any, tmp_path: Path) -> Path:
    """A copy of the artifact of `train`."""
    place = refs_of(Store(made.outputs))["train"]
    return Path(shutil.copytree(place, tmp_path / place.name))


def test_damaged_manifest_is_refused_with_the_remedy(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for data in [*truncations(whole), *flips(whole, 7)]:
        with pytest.raises(ValueError, match=r"."):
            parse_manifest(data)
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"is damaged.*Remove the folder; the next run recomputes it"):
        read_manifest(folder)


def save(work: Path, iteration: int) -> None:
    rng = np.random.default_rng(iteration)
    write_save(work, iteration, {"weights": rng.normal(size=7), "moments": rng.normal(size=3)}, {"at": [iteration]})


@pytest.mark.parametrize("name", ["state.json", "arrays.safetensors"])
def test_damaged_state_is_never_resumed(name, tmp_path):
    save(tmp_path, 7)
    place = tmp_path / "00000007"
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    for data in [*truncations(whole[name], 7), *flips(whole[name], 37)]:
        place.mkdir(exist_ok=True)
        for other, content in whole.items():
            (place / other).write_bytes(content)
        (place / name).write_bytes(data)
        assert read_newest(tmp_path) is None
        assert not place.exists()


def test_older_state_is_resumed_if_the_newest_is_damaged(tmp_path):
    save(tmp_path, 3)
    older = shutil.copytree(tmp_path / "00000003", tmp_path / "kept")
    save(tmp_path, 7)
    older.rename(tmp_path / "00000003")  # as after a crash before it was removed
    assert read_newest(tmp_path)[1] == {"iteration": 7, "at": [7]}
    (tmp_path / "00000007" / "arrays.safetensors").write_bytes(b"")
    found = read_newest(tmp_path)
    assert found[1] == {"iteration": 3, "at": [3]}
    np.testing.assert_array_equal(found[0]["weights"], np.random.default_rng(3).normal(size=7))


@pytest.mark.parametrize(
    ("step", "name", "damage", "message"),
    [
        ("source", "text.txt", "flip", "has other contents than its manifest says"),
        ("train", "model.bin", "cut", "has 511 bytes instead of 512"),
    ],
)
def test_damaged_input_is_refused(step, name, damage, message, made, tmp_path):
    stubs = made.copy(tmp_path / "stubs")
    for manifest in list(Store(stubs.outputs).manifests()):
        if step in [made["step"] for made in manifest["inputs"].values()]:
            shutil.rmtree(stubs.outputs / "store" / manifest["name"])
    path = refs_of(Store(stubs.outputs))[step] / name
    data = bytearray(path.read_bytes())
    data[random.Random(step).randrange(len(data))] ^= 4
    path.unlink()
    path.write_bytes(data if damage == "flip" else data[:-1])
    code, text = stubs.run()
    assert code == 2
    assert f"{name} {message}" in text
    assert "Remove the folder; the next run recomputes it." in text
    shutil.rmtree(path.parent)
    assert stubs.run()[0] == 0
    assert stubs.trees() == made.trees()
