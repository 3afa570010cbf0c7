"""Text shards: parquet files with a column of documents. A corpus artifact holds them, or pins where they are.

Of packages and local files: shard_00000.parquet … are for training, validation.parquet is held out, as nanochat's; the
column is `text`. Of the Hub: corpus.json names the commit and lists every file with its checksum; the files themselves
lie once on the machine, in the Hub's cache, and are fetched when they are read, or ahead of it (`prefetch.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.data.listing import LISTING
from mlxchat.errors import DataError
from mlxchat.hub.cache import read_json
from mlxchat.hub.files import HubFile
from mlxchat.runner.fingerprint import hash_file
from mlxchat.runner.store import MANIFEST

VALIDATION = "validation.parquet"
COLUMN = "text"
# Documents that are in memory at a time, whatever the size of a file's row groups.
_BATCH_DOCUMENTS = 1024

Check = Callable[[], None]


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Shard:
    """A file of documents, or a part of its rows: on this machine, or on the Hub until somebody needs it."""

    name: str
    sha256: str
    """Of the file (git's id where the Hub tells no sha256); what is encoded is named by it."""
    local: Path | None = None
    file: HubFile | None = None
    column: str = COLUMN
    first: int = 0
    """The first row that counts."""
    stop: int | None = None
    """The first row that counts no more; None: all to the end."""

    @classmethod
    def of(cls, path: Path, sha256: str | None = None) -> Shard:
        """Return the shard that a local file is."""
        return cls(path.name, sha256 or hash_file(path), local=path)

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.file.bytes if self.file is not None else self.path().stat().st_size

    def identity(self) -> dict[str, Any]:
        """Return what the documents follow from, as plain data."""
        rows = {} if (self.first, self.stop) == (0, None) else {"rows": [self.first, self.stop]}
        return {"text": self.sha256, **({} if self.column == COLUMN else {"column": self.column}), **rows}

    def path(self, check: Check = _nothing) -> Path:
        """Return where the file is; it is fetched and verified now if need be.

        Args:
            check: called while it is fetched; it may raise, to end that.

        Raises:
            DataError: it cannot be had.
            PassingError: the network or the Hub does not work now.
        """
        if self.file is None:
            assert self.local is not None, "a shard is on this machine or on the Hub"
            return self.local
        from mlxchat.hub.client import fetch_files

        return fetch_files([self.file], check=check)[0]

    def count(self, check: Check = _nothing) -> int:
        """Return the number of documents."""
        rows = self._open(check).metadata.num_rows
        return int(min(rows, self.stop if self.stop is not None else rows) - self.first)

    def documents(self, check: Check = _nothing) -> Iterator[str]:
        """Yield the documents in order, a few in memory at a time; an empty cell is an empty document.

        Raises:
            DataError: the file cannot be read, or has no such column of text.
        """
        yield from islice(self._rows(check), self.first, self.stop)

    def _rows(self, check: Check) -> Iterator[str]:
        try:
            for batch in self._open(check).iter_batches(_BATCH_DOCUMENTS, columns=[self.column], use_threads=False):
                yield from (text or "" for text in batch.column(0).to_pylist())
        except (OSError, KeyError, pa.ArrowException, UnicodeDecodeError) as error:  # KeyError: several of that name
            raise DataError(f"{self.name}: cannot be read ({error})") from None

    def _open(self, check: Check) -> Any:
        path = self.path(check)
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        names = file.schema_arrow.names
        if self.column not in names:
            raise DataError(f'{self.name}: no column "{self.column}"; there are {", ".join(names)}')
        kind = file.schema_arrow.field(self.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f'{self.name}: column "{self.column}" holds {kind}, expected text')
        return file


def write_shards(
    folder: Path,
    documents: list[str],
    *,
    validation_documents: int,
    shard_documents: int,
    row_group_documents: int,
) -> None:
    """Write documents as shards: the first `validation_documents` are held out, the rest is for training.

    Raises:
        DataError: nothing would be left to train on.
    """
    if len(documents) <= validation_documents:
        raise DataError(
            f"the corpus has {len(documents)} documents, of which corpus.validation_documents={validation_documents} "
            "are held out: nothing is left to train on. Lower it, or give more text."
        )
    _write_shard(folder / VALIDATION, documents[:validation_documents], row_group_documents)
    for index, start in enumerate(range(validation_documents, len(documents), shard_documents)):
        part = documents[start : start + shard_documents]
        _write_shard(folder / f"shard_{index:05d}.parquet", part, row_group_documents)


def open_shards(corpus: Path, split: str) -> list[Shard]:
    """Return a corpus's shards of 'train' (in order) or 'validation'; nothing is fetched or read.

    Raises:
        DataError: there are none.
    """
    listing = read_json(corpus / LISTING) or {}
    if "hub" in listing:
        return [_from_row(listing["hub"], row) for row in listing["validation" if split == "validation" else "shards"]]
    pattern = VALIDATION if split == "validation" else "shard_*.parquet"
    paths = sorted(corpus.glob(pattern))
    if not paths:
        raise DataError(f"{corpus} holds no {pattern}")
    manifest = read_json(corpus / MANIFEST) or {}
    hashes = {file["path"]: file["sha256"] for file in manifest.get("outputs", ())}
    return [Shard.of(path, hashes.get(path.name)) for path in paths]


def chars_per_byte(corpus: Path) -> float | None:
    """Return the characters of text in a byte of a Hub corpus's files, as measured on its validation files."""
    value = (read_json(corpus / LISTING) or {}).get("chars_per_byte")
    return float(value) if value else None


def write_listing(
    folder: Path, hub: dict[str, Any], train: Sequence[Shard], validation: Sequence[Shard], facts: dict[str, Any]
) -> None:
    """Write corpus.json of a corpus on the Hub.

    Args:
        folder: of the artifact.
        hub: repository, kind, revision (the commit) and column.
        train: its shards, in order.
        validation: those that are held out.
        facts: what else is known.
    """
    rows = {"shards": [_to_row(shard) for shard in train], "validation": [_to_row(shard) for shard in validation]}
    text = json.dumps({"hub": hub, **facts, **rows}, indent=None)
    (folder / LISTING).write_text(text.replace("[[", "[\n[").replace("], [", "],\n[") + "\n", encoding="utf-8")


def iterate_documents(corpus: Path, split: str, chars: float | None = None) -> Iterator[str]:
    """Yield every document of a split once, in order. Files of the Hub that come next are fetched meanwhile.

    Args:
        corpus: folder of the artifact.
        split: 'train' or 'validation'.
        chars: how much of a corpus on the Hub the run will read: so much is fetched in the background.
    """
    from mlxchat.data.prefetch import fetch_ahead

    shards, density = open_shards(corpus, split), chars_per_byte(corpus)
    for index, shard in enumerate(shards):
        fetch_ahead(shards, index + 1, chars, density)
        yield from shard.documents()


def _to_row(shard: Shard) -> list[Any]:
    assert shard.file is not None, "a listing is of the Hub"
    file = shard.file
    rows = [] if (shard.first, shard.stop) == (0, None) else [shard.first, shard.stop]
    return [file.path, file.bytes, file.sha256, file.git_sha1, *rows]


def _from_row(hub: dict[str, Any], row: list[Any]) -> Shard:
    file = HubFile(hub["repository"], hub["kind"], hub["revision"], *row[:4])
    content = file.sha256 or f"git:{file.git_sha1}"
    return Shard(Path(file.path).name, content, None, file, hub["column"], *row[4:6])


def _write_shard(path: Path, documents: list[str], row_group_documents: int) -> None:
    """Write documents in nanochat's format: zstd, no dictionary, small row groups for positions to resume at."""
    table = pa.table({COLUMN: documents})
    pq.write_table(
        table, path, row_group_size=row_group_documents, compression="zstd", compression_level=3,
        use_dictionary=False, write_statistics=False,
    )  # fmt: skip
