"""examples.parquet: prompt, output, expected answer and verdict of every example of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.errors import DataError
from mlxchat.store.manifest import find_wrong_types

EXAMPLES_FILE = "examples.parquet"
ROLLOUTS_FILE = "rollouts.jsonl"
_SCHEMA = pa.schema(
    [
        ("task", pa.string()), ("index", pa.int32()), ("seed", pa.int32()), ("prompt", pa.string()),
        ("output", pa.string()), ("expected", pa.string()), ("verdict", pa.bool_()), ("tokens", pa.int32()),
        ("details", pa.string()),
    ]
)  # fmt: skip

_ROLLOUT = {
    "iteration": int, "question": int, "sample": int, "prompt": str, "output": str, "expected": str,
    "reward": int | float, "parts": {"*": int | float}, "right": bool, "advantage": int | float, "tokens": int,
    "finished": bool,
}  # fmt: skip


def write_examples(path: Path, examples: Iterable[dict[str, Any]]) -> None:
    """Write the rows, `details` as JSON. Equal rows give equal bytes."""
    rows = [
        {name: _encodable(value) for name, value in example.items()}
        | {"details": _encodable(json.dumps(example["details"], sort_keys=True, ensure_ascii=False))}
        for example in examples
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path, compression="zstd", row_group_size=4096)


def _encodable(value: Any) -> Any:
    """Return a text with unpaired surrogates replaced by question marks; parquet cannot store them."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def read_examples(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an evaluation's artifact, `details` as it was; older artifacts hold examples.jsonl.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    path, older = folder / EXAMPLES_FILE, folder / "examples.jsonl"
    if not (path.is_file() or older.is_file()):
        raise DataError(f"{folder.name} holds no examples: only evaluations (eval_base, eval_sft, …) and RL do")
    try:
        if path.is_file():
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        yield row | {"details": json.loads(row["details"])}
            return
        with older.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield {
                    "task": row["task"], "index": row["index"], "seed": None, "prompt": row["question"],
                    "output": row["answer"], "expected": None, "verdict": row["correct"], "tokens": None, "details": {},
                }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"the examples of {folder.name} cannot be read ({error})") from None


def has_rollouts(folder: Path) -> bool:
    """Return True if an artifact has rollouts of RL."""
    return (folder / ROLLOUTS_FILE).is_file()


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Return RL's saved rollouts, last iteration first, grouped by question.

    Raises:
        DataError: they cannot be read.
    """
    try:
        lines = [json.loads(line) for line in (folder / ROLLOUTS_FILE).read_bytes().split(b"\n") if line]
        for number, line in enumerate(lines, start=1):
            if wrong := next(find_wrong_types(line, _ROLLOUT, f"line {number}"), None):
                raise ValueError(wrong)
            if absent := _ROLLOUT.keys() - line.keys():
                raise ValueError(f"line {number} lacks {', '.join(sorted(absent))}")
        return sorted(lines, key=lambda each: -each["iteration"])
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder.name}/{ROLLOUTS_FILE} cannot be read ({error})") from None
