"""The examples of an evaluation: prompt, output, expected answer and verdict of each.

A journal holds them while it runs, examples.parquet afterwards.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlxchat.errors import DataError
from mlxchat.runner.context import Context
from mlxchat.runner.process import Progress
from mlxchat.store.files import Record, Records, crash_point

Example = dict[str, Any]  # one row of examples.parquet, without its task
Answer = Callable[[dict[int, Example]], Iterator[list[Example]]]  # known examples by index → the others, batch by batch
EXAMPLES_FILE = "examples.parquet"
ROLLOUTS_FILE = "rollouts.jsonl"
_COLUMNS = {"index": pa.int32(), "seed": pa.int32(), "verdict": pa.bool_(), "tokens": pa.int32()}  # others are texts
_NAMES = ("task", "index", "seed", "prompt", "output", "expected", "verdict", "tokens", "details")
_SCHEMA = pa.schema([(name, _COLUMNS.get(name, pa.string())) for name in _NAMES])


def answer_all(
    ctx: Context, path: Path, about: Record, total: int, unit: str, answer: Answer,
    progress: Callable[[int, str], Progress] | None = None,
) -> list[Example]:  # fmt: skip
    """Return all `total` examples of a task by index; those of an earlier attempt come from its journal.

    The journal at `path` has `about`, which identifies the evaluation, then a JSON line per batch; one about something
    else is removed. `unit` names the examples on the display, which `progress` returns (None: the context's).
    """
    journal = Records(path)
    first, *lines = journal.read() or [{}]
    if first != {"about": about}:
        lines = []
        path.unlink(missing_ok=True)
        journal.append({"about": about})
    known: dict[int, Example] = {record["index"]: record for line in lines for record in line["results"]}
    with (progress or ctx.progress)(total, unit) as display:
        display.start = len(known)
        display.update(display.start)
        for results in answer(known):
            journal.append({"results": results})
            crash_point("eval.answered")
            known |= {record["index"]: record for record in results}
            display.update(len(known))
            if ctx.should_stop():
                raise ctx.stop(f"{len(known)} of {total} {unit}")
    return [known[index] for index in range(total)]


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
    """Yield the rows of an evaluation's artifact, `details` as it was; raises DataError if it has none."""
    path = folder / EXAMPLES_FILE
    if not path.is_file():
        raise DataError(f"{folder.name} holds no examples: only evaluations (eval_base, eval_sft, …) and RL do")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield row | {"details": json.loads(row["details"])}


def has_rollouts(folder: Path) -> bool:
    """Return True if an artifact has rollouts of RL."""
    return (folder / ROLLOUTS_FILE).is_file()


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Return RL's saved rollouts, last iteration first, grouped by question."""
    lines = [json.loads(line) for line in (folder / ROLLOUTS_FILE).read_bytes().split(b"\n") if line]
    return sorted(lines, key=lambda each: -each["iteration"])
