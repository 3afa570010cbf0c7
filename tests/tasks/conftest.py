"""A Hub in a folder, in place of the functions that tasks download with."""

import fnmatch
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxchat.errors import DataError
from mlxchat.hub import client as hub_module
from mlxchat.hub.client import HubFile

COMMIT = "5ca1ab1e" * 5


@dataclass
class FolderHub:
    """Files by repository and address, and the requests for them."""

    folder: Path
    asked: list[str] = field(default_factory=list)

    def write(self, repository: str, path: str, rows: list[dict[str, Any]]) -> None:
        place = self.folder / repository / path
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), place)

    def write_text(self, url: str, text: str) -> None:
        (self.folder / url.rpartition("/")[2]).write_text(text, encoding="utf-8")

    def list_files(self, repository: str, *, revision: str = "main", pattern: str = "*", **_: Any) -> list[HubFile]:
        self.asked.append(f"{repository}@{revision}:{pattern}")
        root = self.folder / repository
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        return [
            HubFile(repository, "dataset", COMMIT, name, (root / name).stat().st_size, "0" * 64, None)
            for name in names
            if fnmatch.fnmatchcase(name, pattern)
        ]

    def fetch_files(self, files: Iterable[HubFile], **_: Any) -> list[Path]:
        return [self.folder / file.repository / file.path for file in files]

    def fetch_url(self, url: str, *, sha256: str | None = None, **_: Any) -> Path:
        self.asked.append(url)
        place = self.folder / url.rpartition("/")[2]
        if sha256 not in (None, hashlib.sha256(place.read_bytes()).hexdigest()):
            raise DataError(f"{url} is not what it should be")
        return place


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    made = FolderHub(tmp_path / "hub")
    made.folder.mkdir()
    for name in ("list_files", "fetch_files", "fetch_url"):
        monkeypatch.setattr(hub_module, name, getattr(made, name))
    return made
