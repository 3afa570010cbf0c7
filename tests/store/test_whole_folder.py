"""Files and folders are written atomically, and leftovers of killed processes are removed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxchat.errors import StoreError
from mlxchat.store.files import whole_file, whole_folder, write_whole


def fill(path: Path, content: str = "new", *, force: bool = False) -> None:
    with whole_folder(path, force=force) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text(content)


def test_file_is_replaced_atomically(tmp_path):
    place = tmp_path / "file"
    write_whole(place, "old")
    with whole_file(place) as file:
        file.write_text("new")
        assert place.read_text() == "old"
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(place, "new")]


def test_existing_folder_is_replaced_only_by_force(tmp_path):
    fill(tmp_path / "out", "mine")
    with pytest.raises(StoreError, match="exists already"):
        fill(tmp_path / "out")
    assert (tmp_path / "out" / "inside" / "file").read_text() == "mine"
    fill(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "inside" / "file").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_killed_export_leaves_no_folder_and_its_leftovers_are_removed(tmp_path):
    script = f"""
from pathlib import Path
from mlxchat.store.files import whole_folder
with whole_folder(Path({str(tmp_path / "out")!r})) as folder:
    (folder / "half").touch()
"""
    environ = os.environ | {"MLXCHAT_CRASH_AT": "export.synced"}
    assert subprocess.run([sys.executable, "-c", script], env=environ, check=False).returncode == -signal.SIGKILL
    assert [each.name for each in tmp_path.iterdir()] == [".out.unfinished"]
    fill(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["inside"]
