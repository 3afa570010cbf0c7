"""Where documents come from: packages that ship text, and local files. Data sets of the Hub: `hub_corpus.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.errors import DataError
from mlxchat.runner.fingerprint import hash_file
from mlxchat.tasks import bundled


def gather_documents(
    packages: list[str], paths: list[str], *, document_chars: int | None, seed: int
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the documents of packages and local files, shuffled once, and a record of each source.

    Args:
        packages: names of packages that ship text.
        paths: local files.
        document_chars: packages' documents are cut at sentence ends into parts no longer than this; None: whole.
        seed: of the order.

    Raises:
        DataError: a package or file is missing, cannot be read or holds no text.
    """
    documents: list[str] = []
    sources: list[dict[str, Any]] = []
    for source in bundled.sources(packages):
        texts = [document.text for document in bundled.documents([source.name], document_chars)]
        documents += texts
        sources.append(
            {
                "name": source.name,
                "version": source.version,
                "licence": source.licence,
                "sha256": source.digest(),
                "chars": sum(map(len, texts)),
            }
        )
    for path in map(Path, paths):
        texts = [text for text in read_file(path) if text.strip()]
        documents += texts
        sources.append({"name": path.name, "sha256": hash_file(path), "chars": sum(map(len, texts))})
    if not documents:
        raise DataError("the corpus is empty: give corpus.packages, corpus.paths or corpus.hub")
    random.Random(seed).shuffle(documents)
    return documents, sources


def read_file(path: Path) -> Iterator[str]:
    """Yield the documents of a .txt (parts between blank-line pairs), .jsonl (`text`) or .parquet (`text`) file.

    Raises:
        DataError: another ending, no such field, or lines that are not JSON, all of them by number.
    """
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise DataError(f"{path}: expected a .txt, .jsonl or .parquet file")
    try:
        yield from _READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _read_text(path: Path) -> Iterator[str]:
    yield from path.read_text(encoding="utf-8").split("\n\n\n")


def _read_jsonl(path: Path) -> Iterator[str]:
    bad = []
    # Not splitlines: JSON allows U+2028 and its like inside a line.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if isinstance(text, str):
            yield text.encode(errors="replace").decode()  # half a character is in no file of ours
        else:
            bad.append(str(number))
    if bad:
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise DataError(f'{path}: lines {", ".join(bad[:20])}{more} are no JSON objects with a field "text"')


def _read_parquet(path: Path) -> Iterator[str]:
    file = pq.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise DataError(f'{path}: no column "text"; there are {", ".join(file.schema_arrow.names)}')
    kind = file.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f'{path}: column "text" holds {kind}, expected text')
    for batch in file.iter_batches(columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


_READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
