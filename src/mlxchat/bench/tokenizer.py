"""Speed of tokenizer training and encoding, compared with nanochat's use of the same libraries.

Text: the bundled documents, repeated, with new words so that the number of distinct pieces grows as in web text.
nanochat trains by handing rustbpe an iterator in its own process, and encodes batches of 128 documents by tiktoken's
`encode_ordinary_batch` with four threads.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mlxchat.bench.tables import make_table
from mlxchat.config.schema import Config
from mlxchat.config.wording import format_count
from mlxchat.data.bpe import TrainingProcess
from mlxchat.data.sources import gather_documents
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import SPECIAL_TOKENS, SPLIT_PATTERN
from mlxchat.ops.device import describe_device
from mlxchat.ops.machine import available_cores
from mlxchat.runner.progress import Progress
from mlxchat.store.environment import versions

_NANOCHAT_BATCH, _NANOCHAT_THREADS = 128, 4
_PART_DOCUMENTS = 128
_LETTERS = "eeeeetttaaaooiinnsshhrrdlucmfwypvbgk"
# Distinct pieces of n characters of web text: 25,000 × (n / 1e6)^0.67.
_PIECES, _GROWTH = 25_000, 0.67
_ROUNDS = 2

_NANOCHAT = """
import json, sys, time
import pyarrow.parquet as pq, rustbpe
path, num_tokens, pattern = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def texts():
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        for text in file.read_row_group(group).column("text").to_pylist():
            yield text[:10000] if len(text) > 10000 else text
began = time.monotonic()
trainer = rustbpe.Tokenizer()
trainer.train_from_iterator(texts(), num_tokens, pattern=pattern)
ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
seconds = time.monotonic() - began
print(json.dumps([seconds, sorted((rank, token.hex()) for token, rank in ranks.items())]))
"""


def measure_tokenizer(config: Config) -> dict[str, Any]:
    """Return seconds, and characters per second of both, measured alternately; ranks and ids are compared."""
    bench = config.bench
    with tempfile.TemporaryDirectory() as name, Progress("tokenizer", 2 * _ROUNDS + 2, "measurements") as progress:
        shard = Path(name, "shard_00000.parquet")
        documents = list(_documents(config, bench.chars))
        pq.write_table(pa.table({"text": documents}), shard, row_group_size=1024, compression="zstd")
        chars = sum(map(len, documents))
        num_tokens = bench.vocab_size - len(SPECIAL_TOKENS)
        trainings: dict[str, list[float]] = {"ours": [], "nanochat": []}
        ranks: dict[bytes, int] = {}
        for turn in range(_ROUNDS):
            seconds, theirs = _train_as_nanochat(shard, num_tokens)
            trainings["nanochat"].append(seconds)
            progress.update(2 * turn + 1)
            began = time.monotonic()
            with TrainingProcess(num_tokens) as training:
                *_, _ = training.read(_read(shard))
                ranks = training.ranks()
            trainings["ours"].append(time.monotonic() - began)
            progress.update(2 * turn + 2)
        tokenizer = Tokenizer(ranks)
        part = documents[: max(1, len(documents) // 4)]
        encodings = _compare_encoding(tokenizer, part, bench.steps)
    return {
        "chars": chars,
        "documents": len(documents),
        "vocab_size": bench.vocab_size,
        "same_ranks": ranks == theirs,
        "training": {way: _rate(chars, min(found)) for way, found in trainings.items()},
        "encoding": encodings,
        "device": describe_device(),
        "versions": versions(),
    }


def print_tables(record: dict[str, Any], stream: TextIO) -> None:
    """Print what `measure_tokenizer` returned."""
    console = Console(file=stream, highlight=False)
    console.print(
        f"{format_count(record['chars'])} characters in {record['documents']:,} documents, "
        f"vocabulary {record['vocab_size']:,}, "
        f"{record['device']['cores']} cores"
    )
    table = make_table("", "mlxchat", "nanochat's way", "ratio")
    for name in ("training", "encoding"):
        ours, theirs = record[name]["ours"], record[name]["nanochat"]
        speeds = [f"{format_count(way['chars_per_second'])} chars/s" for way in (ours, theirs)]
        table.add_row(name, *speeds, f"{ours['chars_per_second'] / theirs['chars_per_second']:.2f}")
    console.print(table)
    same = "the same ranks" if record["same_ranks"] else "RANKS DIFFER"
    console.print(f"{same}; {'the same ids' if record['encoding']['same_ids'] else 'IDS DIFFER'}")


def _rate(chars: int, seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "chars_per_second": chars / seconds}


def _documents(config: Config, chars: int) -> Iterator[str]:
    """Yield documents of a few hundred words, as long as web pages, up to so many characters."""
    texts, _ = gather_documents(config.corpus.packages, [], document_chars=None, seed=0)
    words = [word for text in texts for word in f"{text}\n".split(" ")]
    rng, made, pieces = random.Random(0), 0, float(_PIECES)
    while made < chars:
        count = min(len(words), 3000, max(50, int(rng.lognormvariate(6.2, 1.0))))
        start = rng.randrange(len(words) - count + 1)
        page = words[start : start + count]
        made += sum(map(len, page)) + count
        new = int(_PIECES * (made / 1e6) ** _GROWTH - pieces)
        for place in rng.sample(range(count), min(count, max(0, new))):
            word = "".join(rng.choices(_LETTERS, k=rng.randint(4, 11)))
            page[place] = rng.choice((word, word, word.capitalize(), f"{word}{rng.randint(0, 9999)}"))
            pieces += 1
        yield " ".join(page)


def _read(shard: Path) -> Iterator[str]:
    """Yield documents as the tokenizer step does."""
    for batch in pq.ParquetFile(shard).iter_batches(1024, columns=["text"], use_threads=False):
        yield from (text[:10_000] for text in batch.column(0).to_pylist())


def _train_as_nanochat(shard: Path, num_tokens: int) -> tuple[float, dict[bytes, int]]:
    command = [sys.executable, "-c", _NANOCHAT, str(shard), str(num_tokens), SPLIT_PATTERN]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, ranks = json.loads(done.stdout)
    return seconds, {bytes.fromhex(token): rank for rank, token in ranks}


def _compare_encoding(tokenizer: Tokenizer, documents: list[str], rounds: int) -> dict[str, Any]:
    chars, threads = sum(map(len, documents)), available_cores()

    def ours() -> list[Any]:
        parts = [documents[start : start + _PART_DOCUMENTS] for start in range(0, len(documents), _PART_DOCUMENTS)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(tokenizer.encode_documents, parts) for ids in part]

    def theirs() -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(documents), _NANOCHAT_BATCH):
            batch = documents[start : start + _NANOCHAT_BATCH]
            rows = tokenizer.encoding.encode_ordinary_batch(batch, num_threads=_NANOCHAT_THREADS)
            for row in rows:
                row.insert(0, tokenizer.bos)
            found += rows
        return found

    def seconds_of(work: Callable[[], list[Any]]) -> float:
        began = time.monotonic()
        work()
        return time.monotonic() - began

    same = all(np.array_equal(left, right) for left, right in zip(ours(), theirs(), strict=True))
    times = [(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)]
    ways = {way: _rate(chars, median(pair[index] for pair in times)) for index, way in enumerate(("ours", "nanochat"))}
    return {**ways, "same_ids": same, "threads": threads}
