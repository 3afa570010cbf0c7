"""Where documents come from: packages that ship text, local files, datasets on the Hugging Face Hub."""

from __future__ import annotations

import fnmatch
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.config import HubConfig
from mlxchat.data import bundled
from mlxchat.data.shards import VALIDATION
from mlxchat.errors import DataError
from mlxchat.runner.fingerprint import hash_file


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
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if isinstance(text, str):
            yield text
        else:
            bad.append(str(number))
    if bad:
        raise DataError(f'{path}: lines {", ".join(bad[:20])} are no JSON objects with a field "text"')


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


def link_hub_shards(hub: HubConfig, out: Path) -> list[dict[str, Any]]:
    """Download a Hub dataset's shards into the artifact; return a record of each file.

    Training files keep their order as shard_00000.parquet …, the validation files become the validation shard.
    Downloads go through huggingface_hub, which resumes, caches (HF_HOME) and respects HF_ENDPOINT and tokens.

    Raises:
        DataError: no file matches, or the column is missing.
    """
    from huggingface_hub import HfApi, hf_hub_download

    # Not from the HTTP library itself, which has another name in each major version of huggingface_hub.
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    try:
        info = HfApi().dataset_info(hub.repository, revision=hub.revision)
    except (HTTPError, OSError) as error:
        raise DataError(f"{hub.repository}@{hub.revision}: the Hub cannot be asked ({error})") from None
    names = sorted(sibling.rfilename for sibling in info.siblings or [])
    validation = fnmatch.filter(names, hub.validation_files)
    train = [name for name in fnmatch.filter(names, hub.train_files) if name not in validation]
    train = train[: hub.num_train_files]
    if not train or not validation:
        raise DataError(
            f"{hub.repository} has {len(train)} files like {hub.train_files} and {len(validation)} like "
            f"{hub.validation_files}; both are needed. Files: {', '.join(names[:10])} …"
        )
    records = []
    parts: list[Path] = []
    for name in [*train, *validation]:
        try:
            path = Path(hf_hub_download(hub.repository, name, repo_type="dataset", revision=info.sha))
        except (HTTPError, LocalEntryNotFoundError, OSError) as error:
            raise DataError(f"{hub.repository}: {name} could not be downloaded ({error})") from None
        records.append({"url": f"{hub.repository}/{name}", "revision": info.sha, "sha256": hash_file(path)})
        if name in validation:
            parts.append(path)
        else:
            _copy_column(path, out / f"shard_{len(records) - 1:05d}.parquet", hub.column)
    if len(parts) == 1:
        _copy_column(parts[0], out / VALIDATION, hub.column)
    else:
        tables = [pq.read_table(path, columns=[hub.column]).rename_columns(["text"]) for path in parts]
        pq.write_table(pa.concat_tables(tables), out / VALIDATION, compression="zstd", row_group_size=1024)
    return records


def _copy_column(source: Path, target: Path, column: str) -> None:
    """Copy a parquet file whose text column is already called so; else rewrite it with that column alone."""
    names = pq.ParquetFile(source).schema_arrow.names
    if column not in names:
        raise DataError(f'{source.name}: no column "{column}"; there are {", ".join(names)}')
    if names == ["text"]:
        shutil.copyfile(source, target)
    else:
        table = pq.read_table(source, columns=[column]).rename_columns(["text"])
        pq.write_table(table, target, compression="zstd", row_group_size=1024)
