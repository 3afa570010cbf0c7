"""Files that were cut or altered are told from whole ones, and never used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxchat.errors import StoreError
from mlxchat.store.files import seal, unseal
from mlxchat.store.manifest import parse_manifest, read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store
from mlxchat.training.state import read_newest, write_save


def truncations(data: bytes) -> Iterator[bytes]:
    """Yield the data cut before each of its bytes."""
    return (data[:length] for length in range(len(data)))


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


def test_a_manifest_cut_at_any_byte_or_with_any_one_bit_flipped_is_refused(folder: Path) -> None:
    whole = (folder / "manifest.json").read_bytes()
    for data in [*truncations(whole), *flips(whole)]:
        with pytest.raises(ValueError, match=r"."):
            parse_manifest(data)


def test_a_damaged_manifest_is_told_with_the_remedy(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for data in (b"", whole[:-1], next(flips(whole, 999))):
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"is damaged .*Remove the folder; the next run recomputes it"):
            read_manifest(folder)


def test_a_manifest_from_before_there_were_digests_is_read(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = read_manifest(folder)
    path.write_text(json.dumps(whole | {"schema": 1}))
    assert read_manifest(folder) == whole | {"schema": 1}


def test_a_sealed_record_is_json_whose_digest_covers_every_byte_before_it() -> None:
    record = {"name": "Jürgen\u2028", "numbers": [1, 2.5, None], "digest": "of an older text"}
    data = seal(record)
    rest = {key: value for key, value in record.items() if key != "digest"}
    assert json.loads(data).keys() == record.keys()
    assert unseal(data) == (rest, True)
    assert unseal(json.dumps(rest).encode()) == (rest, False)


def save(work: Path, iteration: int) -> None:
    rng = np.random.default_rng(iteration)
    write_save(work, iteration, {"weights": rng.normal(size=7), "moments": rng.normal(size=3)}, {"at": [iteration]})


@pytest.mark.parametrize("name", ["state.json", "arrays.safetensors"])
def test_a_saved_state_cut_or_altered_anywhere_is_never_continued(name: str, tmp_path: Path) -> None:
    save(tmp_path, 7)
    place = tmp_path / "00000007"
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    for data in [*truncations(whole[name]), *flips(whole[name], 5)]:
        place.mkdir(exist_ok=True)
        for other, content in whole.items():
            (place / other).write_bytes(content)
        (place / name).write_bytes(data)
        assert read_newest(tmp_path) is None
        assert not place.exists()


def test_behind_a_damaged_save_the_older_one_is_continued(tmp_path: Path) -> None:
    save(tmp_path, 3)
    older = shutil.copytree(tmp_path / "00000003", tmp_path / "kept")
    save(tmp_path, 7)
    older.rename(tmp_path / "00000003")  # as after a crash before it was removed
    found = read_newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 7, "at": [7]}
    (tmp_path / "00000007" / "arrays.safetensors").write_bytes(b"")
    found = read_newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 3, "at": [3]}
    np.testing.assert_array_equal(found[0]["weights"], np.random.default_rng(3).normal(size=7))


def test_a_save_from_before_there_were_digests_is_continued(tmp_path: Path) -> None:
    save(tmp_path, 7)
    path = tmp_path / "00000007" / "state.json"
    path.write_text(json.dumps({"iteration": 7, "at": [7]}))
    found = read_newest(tmp_path)
    assert found is not None
    assert found[1] == {"iteration": 7, "at": [7]}


def test_an_unfinished_save_is_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".00000005.tmp").mkdir(parents=True)
    save(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["00000007"]


@pytest.mark.parametrize(("step", "name"), [("train", "model.bin"), ("convert", "table.txt"), ("source", "text.txt")])
def test_an_input_with_a_flipped_bit_is_refused_by_whoever_needs_it(
    step: str, name: str, made: Any, tmp_path: Path
) -> None:
    stubs = made.copy(tmp_path / "stubs")
    for manifest in list(Store(stubs.outputs).manifests()):
        if step in [made["step"] for made in manifest["inputs"].values()]:
            shutil.rmtree(stubs.outputs / "store" / manifest["name"])
    path = refs_of(Store(stubs.outputs))[step] / name
    data = bytearray(path.read_bytes())
    data[random.Random(step).randrange(len(data))] ^= 4
    path.write_bytes(bytes(data))
    code, text = stubs.run()
    assert code == 2
    assert f"{name} has other contents than its manifest says" in text
    assert "Remove the folder; the next run recomputes it." in text
    shutil.rmtree(path.parent)
    assert stubs.run()[0] == 0
    assert stubs.trees() == made.trees()


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_an_input_without_all_of_its_bytes_is_refused(damage: str, made: Any, tmp_path: Path) -> None:
    stubs = made.copy(tmp_path / "stubs")
    shutil.rmtree(refs_of(Store(stubs.outputs))["score"])
    path = refs_of(Store(stubs.outputs))["train"] / "model.bin"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    code, text = stubs.run()
    assert code == 2
    assert {"cut": "model.bin has 511 bytes instead of 512", "missing": "model.bin is missing"}[damage] in text


@pytest.mark.parametrize("name", ["attempts.jsonl", "ckpt/records/metrics.jsonl"])
def test_notes_of_a_killed_step_that_are_cut_or_altered_change_nothing_of_the_result(
    name: str, made: Any, make_stubs: Callable[[], Any], tmp_path: Path
) -> None:
    stubs = make_stubs()
    assert stubs.run(AT="train.iteration:3")[0] == -9
    (path,) = (stubs.outputs / "work").glob(f"*/{name}")
    whole = path.read_bytes()
    rng = random.Random(name)
    for data in (whole[: rng.randrange(len(whole))], next(flips(whole, rng.randrange(1, 99))), b"", b"\xff\x00"):
        copy = stubs.copy(tmp_path / str(len(list(tmp_path.iterdir()))))
        next((copy.outputs / "work").glob(f"*/{name}")).write_bytes(data)
        code, text = copy.run()
        assert code == 0, text
        copy.check_clean()
        assert copy.trees() == made.trees()


SIZES = [0, 40, 200, 400, 1000, 1400, 2000]


@pytest.mark.parametrize("size", SIZES)
def test_files_that_may_not_grow_end_a_run_in_words_and_the_next_one_succeeds(size: int, stubs: Any, made: Any) -> None:
    (stubs.folder / "sitecustomize.py").write_text(
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    )
    code, text = stubs.run(pythonpath=str(stubs.folder))
    assert code in (1, 2), text
    assert "File too large" in text
    assert "Traceback (" not in text
    stubs.check_whole()
    assert stubs.run()[0] == 0
    stubs.check_clean()
    assert stubs.trees() == made.trees()
