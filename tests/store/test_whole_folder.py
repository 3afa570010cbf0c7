"""Files and folders are written atomically, and leftovers of killed processes are removed."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from mlxchat.errors import StoreError
from mlxchat.store.files import is_alive, whole_file, whole_folder, write_whole


def gone_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def fill(path: Path, content: str = "new", *, force: bool = False) -> None:
    with whole_folder(path, force=force) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text(content)


def test_file_is_replaced_atomically(tmp_path):
    place = tmp_path / "file"
    write_whole(place, "old")
    with whole_file(place) as first, whole_file(place, durable=False) as second:
        first.write_text("first")
        second.write_text("second")
        assert place.read_text() == "old"
    assert place.read_text() == "first", "the last rename wins"
    assert list(tmp_path.iterdir()) == [place]


def test_error_keeps_the_old_file(tmp_path):
    place = tmp_path / "file"
    write_whole(place, b"old")

    def fail() -> None:
        with whole_file(place) as unfinished:
            unfinished.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_existing_path_is_replaced_only_by_force(tmp_path, kind):
    place = tmp_path / "out"
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
        (place / "mine").touch()
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="exists already"):
        fill(place)
    assert os.path.lexists(place)
    fill(place, force=True)
    assert (place / "inside" / "file").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_path_filled_meanwhile_is_kept(tmp_path):
    place = tmp_path / "out"

    def be_late() -> None:
        with whole_folder(place) as folder:
            (folder / "file").write_text("x")
            place.mkdir()
            (place / "mine").touch()

    with pytest.raises(StoreError, match="filled meanwhile"):
        be_late()
    assert [each.name for each in place.iterdir()] == ["mine"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_ended_processes_are_removed(tmp_path):
    host = socket.gethostname()
    gone = tmp_path / f".out.unfinished-{host}-{gone_process()}"
    alive = tmp_path / f".out.unfinished-{host}-{os.getppid()}"
    elsewhere = tmp_path / ".out.unfinished-another_machine-1"
    for place in (gone, alive, elsewhere):
        place.mkdir()
    fill(tmp_path / "out")
    assert {each.name for each in tmp_path.iterdir()} == {"out", alive.name, elsewhere.name}


def test_kill_between_two_renames_is_undone(tmp_path):
    former = tmp_path / f".out.replaced-{socket.gethostname()}-{gone_process()}"
    former.mkdir()
    (former / "mine").touch()
    with pytest.raises(StoreError, match="exists already"):
        fill(tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["mine"]
    fill(tmp_path / "out", force=True)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_process_of_another_user_counts_as_running(monkeypatch):
    """Its lock must not be taken, nor its unfinished folder removed."""

    def refuse(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive(1)
