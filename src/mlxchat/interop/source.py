"""Sources of third-party models: a repository of the Hub at a commit, or a folder."""

import fnmatch
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.hub.cache import HubFile
from mlxchat.hub.client import fetch_files, list_files, record
from mlxchat.store.fingerprint import hash_file

_MOST_FILES, _DEEPEST, _MOST_SHOWN = 20_000, 4, 8

Check = Callable[[], None]


def read_json(content: Path | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a file or of its contents."""
    try:
        found = json.loads(content.read_bytes() if isinstance(content, Path) else content)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({error}). Copy it again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{where} is not a JSON object")
    return found


@dataclass(frozen=True)
class ModelSource:
    """Files by name, among them a model's."""

    where: str
    """The repository or the folder, for messages."""
    files: dict[str, HubFile | Path] = field(default_factory=dict)
    """Path with / → file."""

    def has(self, name: str) -> bool:
        """Return True if the file exists."""
        return name in self.files

    def listed(self) -> str:
        """Return the first names, for messages."""
        return ", ".join(sorted(self.files)[:_MOST_SHOWN]) or "nothing"

    def fetch(self, names: Iterable[str], check: Check = lambda: None) -> dict[str, Path]:
        """Return name → local path, after downloading and verifying files of the Hub."""
        names = list(names)
        wanted = [file for name in names if isinstance(file := self.files[name], HubFile)]
        if wanted:
            fetch_files(wanted, check=check)
        return {name: file.place if isinstance(file := self.files[name], HubFile) else file for name in names}

    def sha256(self, name: str, hash_of: Callable[[Path], str] = hash_file) -> str:
        """Return a file's sha256; for large files of the Hub it is in the listing."""
        file = self.files[name]
        if isinstance(file, HubFile):
            return file.sha256 or hash_file(self.fetch([name])[name])
        return hash_of(file)

    def small(self, name: str) -> bytes:
        """Return the content of a small file, downloaded if necessary."""
        try:
            return self.fetch([name])[name].read_bytes()
        except OSError as error:
            raise DataError(f"{self.where}: {name} cannot be read ({error.strerror or error})") from None

    def record(self, name: str) -> dict[str, Any]:
        """Return a file's record for manifests: url, revision, sha256, bytes."""
        file = self.files[name]
        if isinstance(file, HubFile):
            return record(file)
        return {"url": str(file), "revision": None, "sha256": hash_file(file), "bytes": file.stat().st_size}


def open_repository(repository: str, revision: str) -> ModelSource:
    """Return the files of a model repository, <organisation>/<name>, or of a folder in it, …/<folder>."""
    owner, _, rest = repository.partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name:
        raise ConfigError(
            f'"{repository}" is not a repository: expected <organisation>/<name>, such as karpathy/nanochat-d32'
        )
    files = list_files(f"{owner}/{name}", revision=revision, kind="model")
    return ModelSource(repository, _within({file.path: file for file in files}, folder, f"{owner}/{name}"))


def open_folder(folder: Path) -> ModelSource:
    """Return the files of a folder and its subfolders, and a tokenizer in its parents."""
    if not folder.is_dir():
        near = suggest(folder.name, (each.name for each in folder.parent.iterdir())) if folder.parent.is_dir() else ""
        kind = "is a file, expected its folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {kind}.{near}")
    found: dict[str, HubFile | Path] = {}
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEEPEST else []
        for name in sorted(names):
            path = Path(place, name)
            found[path.relative_to(folder).as_posix()] = path
        if len(found) > _MOST_FILES:
            raise DataError(f"{folder} has more than {_MOST_FILES:,} files: give the folder of the model itself")
    # nanochat keeps checkpoints in <base>/chatsft_checkpoints/d20/, the tokenizer in <base>/tokenizer/.
    for above in (folder.absolute().parent, folder.absolute().parent.parent):
        if (above / "tokenizer" / "tokenizer.pkl").is_file():
            found.setdefault("tokenizer/tokenizer.pkl", above / "tokenizer" / "tokenizer.pkl")
    return ModelSource(str(folder), found)


def _within(files: dict[str, HubFile], folder: str, repository: str) -> dict[str, HubFile | Path]:
    folder = folder.strip("/")
    if not folder:
        return dict(files)
    inside: dict[str, HubFile | Path] = {
        path.removeprefix(f"{folder}/"): file for path, file in files.items() if path.startswith(f"{folder}/")
    }
    if not inside:
        folders = sorted({path.rsplit("/", 1)[0] for path in files if "/" in path})
        known = f" It has {', '.join(folders[:8])}." if folders else " It has no folders."
        raise DataError(f"{repository} has no folder {folder}.{known}{suggest(folder, folders)}")
    for path, file in files.items():
        if path.startswith("tokenizer/"):
            inside.setdefault(path, file)
    return inside


PREFIX = "hf:"
# Files of a repository that mlx-lm reads; neither pickles nor code.
_READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def outside_folder(reference: str) -> Path:
    """Return the folder of a third-party model, after downloading missing files.

    `reference` is hf:FOLDER, hf:ORGANISATION/NAME or hf:ORGANISATION/NAME@REVISION, else a ConfigError. DataError:
    there is no such folder or repository, or it has no model; PassingError: the Hub does not answer.
    """
    what = reference.removeprefix(PREFIX)
    folder = Path(what).expanduser()
    if folder.exists() or what.startswith((".", "/", "~")):
        open_folder(folder)
        return folder
    repository, _, revision = what.partition("@")
    if repository.count("/") != 1:
        raise ConfigError(f'"{reference}" is not a model: expected {PREFIX}FOLDER or {PREFIX}ORGANISATION/NAME')
    source = open_repository(repository, revision or "main")
    names = [name for name in source.files if "/" not in name and any(fnmatch.fnmatch(name, each) for each in _READ)]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise DataError(f"{repository} has no model for mlx-lm: expected config.json and *.safetensors")
    config = source.files["config.json"]
    assert isinstance(config, HubFile)
    source.fetch(names)
    return config.place.parent
