"""Where fsspec leads: a place for artifacts behind a URL, and what is told when it cannot be reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlxchat.errors import ConfigError, MlxchatError, PassingError, StoreError
from mlxchat.runner.secrets import redact
from mlxchat.runner.store import MANIFEST, Manifest, parse_manifest
from mlxchat.runner.verifying import check_manifest

_MANIFEST_BYTES = 1 << 26
# Scheme → what brings it and what it asks of the environment.
_NEEDS = {
    "s3": ("s3fs", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or AWS_ENDPOINT_URL of another server"),
    "s3a": ("s3fs", "as s3://"),
    "gs": ("gcsfs", "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login"),
    "gcs": ("gcsfs", "as gs://"),
    "az": ("adlfs", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    "abfs": ("adlfs", "as az://"),
    "sftp": ("paramiko", "a key that ssh uses without asking"),
    "ssh": ("paramiko", "as sftp://"),
    "hf": ("huggingface_hub", "HF_TOKEN"),
}


@dataclass(frozen=True)
class Place:
    """Where artifacts lie, and how it is reached."""

    url: str
    files: Any
    """The file system of fsspec's."""
    root: str
    folder: str = "store"
    """Of its artifacts; "": they lie in the root itself, as in a copy of a store."""

    def path(self, *parts: str) -> str:
        """Return the path of something in its store."""
        return "/".join((self.root.rstrip("/"), *filter(None, (self.folder, *parts))))

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest of an artifact, or None if there is none or one that was cut.

        Raises:
            StoreError: there is one that was altered.
        """
        try:
            if self.files.info(self.path(name, MANIFEST))["size"] > _MANIFEST_BYTES:
                raise StoreError(f"{self.url}: the manifest of {name} is too large for one")
            data = self.files.cat_file(self.path(name, MANIFEST))
        except FileNotFoundError:
            return None
        try:
            manifest = parse_manifest(data)
            faults = [*check_manifest(name, manifest)]
        except ValueError as error:
            faults = [str(error)]
        if faults:
            raise StoreError(f"{self.url}: the manifest of {name} is damaged ({'; '.join(faults)})")
        return manifest

    def names(self) -> list[str]:
        """Return the folders that are there, whether they are whole or not."""
        self.files.invalidate_cache()
        try:
            found = self.files.ls(self.path(), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory")


def open_place(url: str) -> Place:
    """Return the place of a URL; nothing of it is looked at yet.

    Raises:
        ConfigError: no file system of fsspec's has this scheme, or its package is not installed.
    """
    scheme = url.partition("://")[0]
    if not url.partition("://")[2].strip("/"):
        raise ConfigError(f"{url} names no folder: expected for instance {scheme}://BUCKET/PATH")
    from fsspec.core import url_to_fs
    from fsspec.registry import available_protocols

    if scheme not in available_protocols():
        raise ConfigError(f"{url}: fsspec knows no {scheme}://. Those for transfers: {', '.join(_NEEDS)}, file, memory")
    with told(url):
        options = {"endpoint": os.environ.get("HF_ENDPOINT") or None} if scheme == "hf" else {}
        files, root = url_to_fs(url, skip_instance_cache=True, **options)
        return Place(redact(url), files, str(root))


@contextmanager
def told(url: str) -> Iterator[None]:
    """Turn what file systems raise into one message each: package, credentials, no such place, or something passing."""
    scheme = url.partition("://")[0]
    package, variables = _NEEDS.get(scheme, (scheme, "its documentation"))
    try:
        yield
    except MlxchatError:
        raise
    except ImportError as error:
        hint = "'mlxchat[s3]'" if package == "s3fs" else package
        raise ConfigError(f"{scheme}:// needs a package that is not installed ({error.name or package}): "
                          f"pip install {hint}") from None  # fmt: skip
    except FileNotFoundError as error:
        raise ConfigError(f"{redact(url)}: there is no such place ({_short(error)})") from None
    except Exception as error:  # each file system has its own
        kinds = {kind.__name__ for each in _causes(error) for kind in type(each).__mro__}
        text = _short(error)
        if isinstance(error, PermissionError) or any("Credential" in kind or "Auth" in kind for kind in kinds):
            raise ConfigError(f"{redact(url)} does not let us in ({text}). It goes by {variables}") from None
        if isinstance(error, ValueError):
            raise ConfigError(f"{redact(url)} cannot be opened: {text}") from None
        raise PassingError(f"{redact(url)}: {text}. The same command goes on from what is there") from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def _short(error: BaseException) -> str:
    return redact(" ".join(str(error).split())[:300]) or type(error).__name__
