"""Corpora: shards of documents from shipped text, local files, or the Hugging Face Hub.

A corpus artifact of shipped text and local files has parquet files with a column `text`: shard_00000.parquet … for
training and validation.parquet, as in nanochat. A corpus on the Hub is pinned, not copied: corpus.json has the commit
and lists every file with its checksum. These files are downloaded on demand, or ahead in the background.

Planning imports this module, so pyarrow is imported only where files are read.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from mlxchat.config.pins import UNKNOWN
from mlxchat.config.schema import CorpusConfig, EvalConfig, HubConfig
from mlxchat.errors import ConfigError, DataError
from mlxchat.hub import client
from mlxchat.hub.cache import HubFile, check_space, hub_cache, missing_bytes
from mlxchat.store.files import read_json
from mlxchat.store.fingerprint import hash_file
from mlxchat.store.manifest import MANIFEST

LISTING = "corpus.json"
VALIDATION = "validation.parquet"
COLUMN = "text"
SUFFIXES = (".txt", ".jsonl", ".parquet")  # of the local files of a corpus
# For FineWeb-Edu and ClimbMix: files of 95 MB with 250 million characters. Measured after the first download.
ESTIMATED_CHARS_PER_BYTE = 2.6

_BATCH_DOCUMENTS = 64
_NAMES_SHOWN = 10

Check = Callable[[], None]  # called often during long work; may raise to end it


@dataclass(frozen=True)
class Shard:
    """A file of documents or a range of its rows, local or on the Hub."""

    name: str
    sha256: str  # of the file; git's id if the Hub lists no sha256. Part of the key of its tokens
    local: Path | None = None
    file: HubFile | None = None
    column: str = COLUMN
    first: int = 0  # first row of the range
    stop: int | None = None  # end of the range, exclusive; None: end of the file

    @classmethod
    def on_hub(cls, file: HubFile, column: str, first: int = 0, stop: int | None = None) -> Shard:
        """Return the shard of a file on the Hub."""
        content = file.sha256 or f"git:{file.git_sha1}"
        return cls(Path(file.path).name, content, None, file, column, first, stop)

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the documents, as plain data."""
        rows = {} if (self.first, self.stop) == (0, None) else {"rows": [self.first, self.stop]}
        return {"text": self.sha256, **({} if self.column == COLUMN else {"column": self.column}), **rows}

    def row(self) -> list[Any]:
        """Return a shard of the Hub as plain data, for LISTING."""
        assert self.file is not None, "only files of the Hub are listed"
        rows = [] if (self.first, self.stop) == (0, None) else [self.first, self.stop]
        return [self.file.path, self.file.bytes, self.file.sha256, self.file.git_sha1, *rows]

    def path(self, check: Check = lambda: None) -> Path:
        """Return the file's path, after downloading and verifying it if necessary."""
        if self.local is not None:
            return self.local
        assert self.file is not None, "a shard is local or on the Hub"
        return client.fetch_files([self.file], check=check)[0]

    def count(self, check: Check = lambda: None) -> int:
        """Return the number of documents."""
        rows = self._open(check).metadata.num_rows
        return int(min(rows, self.stop if self.stop is not None else rows) - self.first)

    def documents(self, check: Check = lambda: None) -> Iterator[str]:
        """Yield the documents in order; null is an empty document."""
        import pyarrow as pa

        batches = self._open(check).iter_batches(_BATCH_DOCUMENTS, columns=[self.column], use_threads=False)
        try:
            rows = (text or "" for batch in batches for text in batch.column(0).to_pylist())
            yield from islice(rows, self.first, self.stop)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{self.name}: cannot be read ({error})") from None

    def _open(self, check: Check) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path(check)
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        kinds = {field.name: str(field.type) for field in file.schema_arrow}
        if kinds.get(self.column) not in ("string", "large_string"):
            columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise DataError(f'{self.name}: no column "{self.column}" of text, expected one of {columns}')
        return file


@dataclass(frozen=True)
class Corpus:
    """The shards of a corpus, from an artifact or a listing of the Hub."""

    train: list[Shard]  # in reading order
    validation: list[Shard]
    chars_per_byte: float = ESTIMATED_CHARS_PER_BYTE  # characters of text per byte of a file on the Hub
    is_measured: bool = False  # whether `chars_per_byte` was measured on the validation files

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Return the corpus of an artifact; nothing is downloaded."""
        listing = read_json(folder / LISTING) or {}
        if "hub" in listing:
            hub = listing["hub"]
            pinned = (hub["repository"], hub["kind"], hub["revision"])
            train, validation = (
                [Shard.on_hub(HubFile(*pinned, *row[:4]), hub["column"], *row[4:6]) for row in listing[split]]
                for split in ("shards", "validation")
            )
            return cls(train, validation, float(listing["chars_per_byte"]), True)
        manifest = read_json(folder / MANIFEST) or {}
        hashes = {file["path"]: file["sha256"] for file in manifest.get("outputs", ())}
        train, validation = (
            [Shard(each.name, hashes.get(each.name) or hash_file(each), each) for each in sorted(folder.glob(name))]
            for name in ("shard_*.parquet", VALIDATION)
        )
        if not train or not validation:
            raise DataError(f"{folder} has no shard_*.parquet or no {VALIDATION}")
        return cls(train, validation)

    @classmethod
    def listed(cls, hub: HubConfig, validation_documents: int) -> Corpus:
        """Return the corpus of a data set of the Hub; only the listing is downloaded.

        Without a pattern for validation files, the first `validation_documents` of the first file are held out.
        """
        files = client.list_files(hub.repository, revision=hub.revision)
        train, held_out = _choose(hub, files)
        if not train or (hub.validation_files and not held_out):
            names = ", ".join(file.path for file in files[:_NAMES_SHOWN])
            raise DataError(
                f"{hub.repository} has {len(train)} files like {hub.train_files} and {len(held_out)} like "
                f"{hub.validation_files}: set corpus.hub.train_files and corpus.hub.validation_files (null: the "
                f"first documents of the first file). Files: {names} …"
            )
        if others := [file for file in train if not file.path.endswith(".parquet")]:
            raise DataError(
                f"{hub.repository}: {others[0].path} is not a parquet file. The Hub converts most data sets: try "
                "corpus.hub.revision=refs/convert/parquet 'corpus.hub.train_files=default/train/*.parquet'"
            )
        shards = [Shard.on_hub(file, hub.column) for file in train[: hub.num_train_files]]
        if hub.validation_files:
            return cls(shards, [Shard.on_hub(file, hub.column) for file in held_out])
        validation = replace(shards[0], name=f"held_out_{shards[0].name}", stop=validation_documents)
        return cls([replace(shards[0], first=validation_documents), *shards[1:]], [validation])

    @classmethod
    def recorded(cls, hub: HubConfig) -> Corpus | None:
        """Return the training files of an earlier listing, or None; uses no network."""
        train, _ = _choose(hub, client.recorded_files(hub.repository, hub.revision) or ())
        return cls([Shard.on_hub(file, hub.column) for file in train[: hub.num_train_files]], []) if train else None

    def shards(self, split: str) -> list[Shard]:
        """Return the shards of 'train' or 'validation'."""
        return self.validation if split == "validation" else self.train

    def documents(self, split: str, chars: float | None = None) -> Iterator[str]:
        """Yield every document of a split once, in order; files with `chars` are downloaded ahead, or the next one."""
        for index, shard in enumerate(self.shards(split), start=1):
            if split == "train":
                self.fetch_ahead(index, chars)
            yield from shard.documents()

    def files(self, split: str = "train") -> list[HubFile]:
        """Return the files of a split that are on the Hub."""
        return [shard.file for shard in self.shards(split) if shard.file is not None]

    def first(self, chars: float) -> list[HubFile]:
        """Return the first training files that have `chars` characters together; all if they have fewer."""
        files = self.files()
        sizes = list(accumulate(file.bytes for file in files))
        return files[: bisect_left(sizes, chars / self.chars_per_byte) + 1]

    def fetch_ahead(self, start: int, chars: float | None = None) -> None:
        """Download training files in the background, from `start` until all have `chars`; None: one file."""
        if files := self.files():
            client.fetch_ahead(files[start : start + 1] if chars is None else self.first(chars)[start:])

    def measure(self, check: Check = lambda: None) -> tuple[Corpus, int, int]:
        """Return the corpus with characters per byte as in the validation, and its documents and characters."""
        documents = chars = 0
        size = 0.0
        for shard, file in zip(self.validation, self.files("validation"), strict=True):
            for document in shard.documents(check):
                documents, chars = documents + 1, chars + len(document)
            # A range of rows counts with its share of the file, assuming rows of equal size.
            share = 1.0 if shard.stop is None else shard.count() / max(1, replace(shard, stop=None).count())
            size += file.bytes * share
        density = chars / max(1.0, size) or ESTIMATED_CHARS_PER_BYTE
        return replace(self, chars_per_byte=density, is_measured=True), documents, chars


def contents_of(hub: HubConfig, hash_of: Callable[[Path], str]) -> list[str]:
    """Return the commit of a data set, for the step's key."""
    return [client.find_commit(hub.repository, hub.revision) or f"{UNKNOWN}{hub.repository} at {hub.revision}"]


def _choose(hub: HubConfig, files: Sequence[HubFile]) -> tuple[list[HubFile], list[HubFile]]:
    held_out = [file for file in files if fnmatch.fnmatchcase(file.path, hub.validation_files or "")]
    train = [file for file in files if fnmatch.fnmatchcase(file.path, hub.train_files) and file not in held_out]
    return train, held_out


# Packages and local files


def gather_documents(
    packages: list[str], paths: list[str], *, document_chars: int | None, seed: int
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the shuffled documents of shipped text and local files (`text_files`), and a record of each source.

    Shipped text and .txt files are split at sentence ends into parts of at most `document_chars`; None: not split.
    """
    from mlxchat.tasks import quickstart

    documents: list[str] = []
    sources: list[dict[str, Any]] = []
    for name in packages:
        texts = list(quickstart.documents(name, document_chars))
        documents += texts
        version, licence = quickstart.licence_of(name)
        facts = {"version": version, "licence": licence, "sha256": quickstart.digest_of(name)}
        sources.append({"name": name, **facts, "chars": sum(map(len, texts))})
    for path in text_files(paths):
        limit = document_chars if path.suffix == ".txt" else None
        texts = [part for text in read_file(path) if text.strip() for part in quickstart.split_text(text, limit)]
        documents += texts
        sources.append({"name": path.name, "sha256": hash_file(path), "chars": sum(map(len, texts))})
    if not documents:
        raise DataError("the corpus is empty: give corpus.packages, corpus.paths or corpus.hub")
    random.Random(seed).shuffle(documents)
    return documents, sources


def text_files(paths: Iterable[str]) -> list[Path]:
    """Return the files of `corpus.paths`: files, text files below folders and those that patterns match."""
    found: dict[Path, None] = {}
    for path in paths:
        files = [Path(path)]
        if not files[0].is_file():
            listed = files_of(files[0]) if files[0].is_dir() else map(Path, glob.glob(path, recursive=True))  # noqa: PTH207  (absolute patterns)
            files = sorted(file for file in listed if file.suffix in SUFFIXES)
        if not files:
            raise ConfigError(f"{path} is no file, and no folder or pattern of {', '.join(SUFFIXES)} files")
        found |= dict.fromkeys(files)
    return list(found)


def contents_of_paths(config: CorpusConfig, hash_of: Callable[[Path], str]) -> list[str]:
    """Return the ending and the sha256 of each file of `corpus.paths`, for a key."""
    return [f"{file.suffix} {hash_of(file)}" for file in text_files(config.paths)]


def read_file(path: Path, column: str = COLUMN) -> Iterator[str]:
    """Yield the documents of a .txt (separated by two blank lines), or a `column` of a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        yield from Shard(str(path), "", local=path, column=column).documents()
    elif path.suffix == ".jsonl":
        from mlxchat.tasks.jsonl import read_lines

        yield from read_lines(path, partial(_text_of, column), f'{{"{column}": "text"}}')
    else:
        yield from _read_text(path).replace("\r\n", "\n").split("\n\n\n")


def _text_of(column: str, value: Any) -> str:
    text = value.get(column) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'no field "{column}" with text')
    return text.encode(errors="replace").decode()  # replaces lone surrogates, which parquet cannot store


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_texts(path: Path, column: str) -> Iterator[str]:
    """Yield the documents of `eval.text`, by file name: .jsonl lines, .parquet rows, any other UTF-8 file whole."""
    for file in files_of(path):
        if file.suffix in (".jsonl", ".parquet"):
            yield from read_file(file, column)
        else:
            yield _read_text(file)


def contents_of_text(config: EvalConfig, hash_of: Callable[[Path], str]) -> list[str]:
    """Return the ending and the sha256 of each file of `eval.text`, for a key."""
    return [] if config.text is None else [f"{file.suffix} {hash_of(file)}" for file in files_of(Path(config.text))]


def files_of(path: Path) -> list[Path]:
    """Return a file, or the files below a folder that are not hidden, sorted; raises ConfigError if it has none."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file())
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise ConfigError(f"{path} holds no files")
    return found


def write_shards(
    folder: Path,
    documents: list[str],
    *,
    validation_documents: int,
    shard_documents: int,
    row_group_documents: int = 256,
) -> None:
    """Write documents as shards in nanochat's format; the first `validation_documents` are held out."""
    if len(documents) <= validation_documents:
        raise DataError(
            f"all {len(documents)} documents of the corpus are held out by corpus.validation_documents="
            f"{validation_documents}. Lower it, give more text, or split long .txt files: corpus.document_chars=800"
        )
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = {VALIDATION: documents[:validation_documents]}
    for index, start in enumerate(range(validation_documents, len(documents), shard_documents)):
        parts[f"shard_{index:05d}.parquet"] = documents[start : start + shard_documents]
    how: dict[str, Any] = {"row_group_size": row_group_documents, "compression": "zstd", "compression_level": 3}
    for name, part in parts.items():
        pq.write_table(pa.table({COLUMN: part}), folder / name, **how, use_dictionary=False, write_statistics=False)


def pin_corpus(
    hub: HubConfig, out: Path, validation_documents: int, train_chars: float | None, check: Check = lambda: None
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Write the artifact of a corpus on the Hub; return its numbers, and records of the pinned files.

    The validation files and the first training file are checked; others up to `train_chars` follow in the background.
    """
    corpus = Corpus.listed(hub, validation_documents)
    files = corpus.files()
    looked_at = [*corpus.files("validation"), files[0]]
    client.fetch_files(looked_at, check=check)
    corpus, documents, chars = corpus.measure(check)
    if not chars or corpus.train[0].count(check) < 1:
        raise DataError(f"{hub.repository}: no document in {' or '.join(file.path for file in looked_at)}")
    if train_chars is not None:
        what = f"The text of this run ({hub.repository}, {len(corpus.first(train_chars))} files)"
        check_space(hub_cache(), missing_bytes(corpus.first(train_chars)), what)
    corpus.fetch_ahead(1, train_chars)
    pinned = {"repository": hub.repository, "kind": "dataset", "revision": files[0].revision, "column": hub.column}
    facts = {"validation_documents": documents, "validation_chars": chars}
    rows = {"shards": [each.row() for each in corpus.train], "validation": [each.row() for each in corpus.validation]}
    text = json.dumps({"hub": pinned, "chars_per_byte": corpus.chars_per_byte, **facts, **rows})
    (out / LISTING).write_text(text.replace("[[", "[\n[").replace("], [", "],\n[") + "\n", encoding="utf-8")
    numbers = {**facts, "train_files": len(files), "train_bytes": sum(file.bytes for file in files)}
    digest = hashlib.sha256("".join(f"{file.etag}  {file.path}\n" for file in files).encode()).hexdigest()
    place = {"url": f"hf://{files[0].kind}s/{files[0].repository}", "revision": files[0].revision}
    listing = {**place, "sha256": digest, "bytes": numbers["train_bytes"], "files": len(files)}
    return numbers, [listing, *map(client.record, looked_at)]
