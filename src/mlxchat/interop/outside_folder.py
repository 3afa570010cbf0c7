"""hf:FOLDER and hf:ORGANISATION/NAME: a model of any architecture that mlx-lm knows, which stays what it is."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from mlxchat.errors import ConfigError, DataError
from mlxchat.hub.cache import HubFile
from mlxchat.interop.source import open_folder, open_repository

PREFIX = "hf:"
# What mlx-lm reads of a repository. Neither pickles nor code are among them.
_READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def outside_folder(reference: str) -> Path:
    """Return the folder of a model of another make; what is not on this machine is fetched.

    Args:
        reference: hf:FOLDER, hf:ORGANISATION/NAME or hf:ORGANISATION/NAME@REVISION.

    Raises:
        ConfigError: it is neither.
        DataError: there is no such folder or repository, or it holds no model.
        PassingError: the Hub does not answer.
    """
    what = reference.removeprefix(PREFIX)
    folder = Path(what).expanduser()
    if folder.exists() or what.startswith((".", "/", "~")):
        open_folder(folder)
        return folder
    repository, _, revision = what.partition("@")
    if repository.count("/") != 1:
        raise ConfigError(f'"{reference}" is no model: expected {PREFIX}FOLDER or {PREFIX}ORGANISATION/NAME')
    source = open_repository(repository, revision or "main")
    names = [name for name in source.files if "/" not in name and any(fnmatch.fnmatch(name, each) for each in _READ)]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise DataError(f"{repository} holds no model that mlx-lm opens: expected config.json and *.safetensors")
    config = source.files["config.json"]
    assert isinstance(config, HubFile)
    source.fetch(names)
    return config.place.parent
