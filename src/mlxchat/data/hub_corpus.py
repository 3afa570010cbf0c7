"""A corpus on the Hugging Face Hub: which of its files are for training, which are held out, and how many are needed.

Nothing is copied: the artifact pins the commit and lists the files. The validation files are those of that name,
however many others are on the machine; a data set without any gives the first documents of its first file.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxchat.config import HubConfig
from mlxchat.data.listing import count_files
from mlxchat.data.prefetch import fetch_ahead
from mlxchat.data.shards import Shard, write_listing
from mlxchat.errors import DataError
from mlxchat.hub.cache import check_space, missing_bytes
from mlxchat.hub.client import HubFile, fetch_files, list_files, record
from mlxchat.hub.files import hub_cache
from mlxchat.runner.progress import plural

_NAMES_SHOWN = 10


@dataclass(frozen=True)
class HubCorpus:
    """The files of a corpus, at one commit."""

    train: list[Shard]
    """In the order in which they are read."""
    validation: list[Shard]

    @property
    def commit(self) -> str:
        """What the revision meant when it was listed."""
        return _file(self.train[0]).revision


def list_corpus(hub: HubConfig, validation_documents: int) -> HubCorpus:
    """Return the shards of a data set of the Hub; nothing but the listing is fetched.

    Args:
        hub: which data set, which files.
        validation_documents: what is held out of the first file if `hub.validation_files` is null.

    Raises:
        DataError: there is no such data set, or no file matches.
    """
    files = list_files(hub.repository, revision=hub.revision)
    names = [file.path for file in files]
    held_out = set(fnmatch.filter(names, hub.validation_files)) if hub.validation_files else set()
    train = [file for file in files if fnmatch.fnmatchcase(file.path, hub.train_files) and file.path not in held_out]
    if not train or (hub.validation_files and not held_out):
        counts = f"{plural(len(train), 'file')} like {hub.train_files}"
        if hub.validation_files:
            counts += f" and {len(held_out)} like {hub.validation_files}"
        raise DataError(
            f"{hub.repository} has {counts}; corpus.hub.train_files and corpus.hub.validation_files (null: the first "
            f"documents of the first file) must name some. Files: {', '.join(names[:_NAMES_SHOWN])} …"
        )
    others = [file for file in train if not file.path.endswith(".parquet")]
    if others:
        raise DataError(
            f"{hub.repository}: {others[0].path} is no parquet file. The Hub converts most data sets: try "
            "corpus.hub.revision=refs/convert/parquet 'corpus.hub.train_files=default/train/*.parquet'"
        )
    shards = [_shard(file, hub.column) for file in train[: hub.num_train_files]]
    if hub.validation_files:
        return HubCorpus(shards, [_shard(file, hub.column) for file in files if file.path in held_out])
    validation = replace(shards[0], name=f"held_out_{shards[0].name}", stop=validation_documents)
    return HubCorpus([replace(shards[0], first=validation_documents), *shards[1:]], [validation])


def pin_corpus(
    hub: HubConfig,
    out: Path,
    *,
    validation_documents: int,
    train_chars: float | None,
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Write the artifact of a corpus on the Hub; return its numbers, and a record of what it pins.

    The validation files and the first training file are fetched and looked at; then, in the background, as many as
    the run will read, for which there must be room on the disk.

    Args:
        hub: which data set.
        out: folder of the artifact.
        validation_documents: see `list_corpus`.
        train_chars: characters that the run will read for training, if that is known.
        check: may raise, to end the work.

    Raises:
        DataError: a file is not what it should be, or the disk has no room for what the run needs.
        PassingError: the Hub does not answer.
    """
    corpus = list_corpus(hub, validation_documents)
    first = [_file(shard) for shard in [*corpus.validation, corpus.train[0]]]
    fetch_files(first, check=check)
    documents, chars, density = measure_validation(corpus, check)
    if not chars or corpus.train[0].count(check) < 1:
        raise DataError(f"{hub.repository}: no document in {first[0].path if not chars else corpus.train[0].name}")
    if train_chars is not None:
        needed = corpus.train[: count_files([shard.bytes for shard in corpus.train], train_chars / density)]
        check_room(needed, f"The text of this run ({hub.repository}, {len(needed)} files)")
    fetch_ahead(corpus.train, 1, train_chars, density)
    facts = {"chars_per_byte": density, "validation_documents": documents, "validation_chars": chars}
    pinned = {"repository": hub.repository, "kind": "dataset", "revision": corpus.commit, "column": hub.column}
    write_listing(out, pinned, corpus.train, corpus.validation, facts)
    files = [_file(shard) for shard in corpus.train]
    metrics: dict[str, float] = {
        "validation_documents": documents,
        "validation_chars": chars,
        "train_files": len(files),
        "train_bytes": sum(file.bytes for file in files),
    }
    return metrics, [_describe(files), *(record(file) for file in first)]


def measure_validation(corpus: HubCorpus, check: Callable[[], None] = lambda: None) -> tuple[int, int, float]:
    """Return the documents and characters of the validation files, and the characters in a byte of them.

    They are fetched if they are not there; see `pin_corpus` for what is raised.
    """
    documents = chars = 0
    for shard in corpus.validation:
        for document in shard.documents(check):
            documents, chars = documents + 1, chars + len(document)
    return documents, chars, chars / max(1.0, sum(_share(shard) for shard in corpus.validation))


def check_room(shards: Iterable[Shard], what: str) -> None:
    """Refuse what the disk of the Hub's cache has no room for; what is there needs none.

    Raises:
        DataError: with the bytes that are missing and those that are free.
    """
    files = [shard.file for shard in shards if shard.file is not None]
    check_space(hub_cache(), missing_bytes((file.blob, file.bytes) for file in files if not file.is_there()), what)


def _shard(file: HubFile, column: str) -> Shard:
    return Shard(Path(file.path).name, file.sha256 or f"git:{file.git_sha1}", None, file, column)


def _file(shard: Shard) -> HubFile:
    assert shard.file is not None, "these are on the Hub"
    return shard.file


def _share(shard: Shard) -> float:
    """Return the bytes of a file that its rows which count take, as far as one row is like another."""
    if shard.stop is None:
        return float(shard.bytes)
    rows = replace(shard, stop=None).count()
    return shard.bytes * shard.count() / max(1, rows)


def _describe(files: list[HubFile]) -> dict[str, Any]:
    """Return one record of all training files: their listing's digest stands for them."""
    digest = hashlib.sha256("".join(f"{file.etag}  {file.path}\n" for file in files).encode()).hexdigest()
    return {
        "url": f"hf://{files[0].kind}s/{files[0].repository}",
        "revision": files[0].revision,
        "sha256": digest,
        "bytes": sum(file.bytes for file in files),
        "files": len(files),
    }
