"""Small conversations, documents and bundles of CORE, as tokens and as files."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENTS = [f"document {number}" for number in range(100)]


def parquet(texts: Sequence[str | None], column: str = "text", **options: Any) -> bytes:
    """Return a parquet file with a column of ids and one of texts; options are those of write_table."""
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), file, **options)
    return file.getvalue()


def core_items(kind: str, count: int, *, story: bool = False) -> list[dict[str, Any]]:
    """Return examples of a type of CORE's tasks; the contexts of a story have a common beginning."""
    rng, words = np.random.default_rng(count), ["the", "cat", "sat", "on", "the", "mat", "and", "dog", "log"]

    def text(number: int) -> str:
        return " ".join(rng.choice(words, number))

    begin, items = text(12), list[dict[str, Any]]()
    for _ in range(count):
        if kind == "multiple_choice":
            choices = [f"{text(2)} {place}" for place in range(4)]
            items.append({"query": text(4), "choices": choices, "gold": int(rng.integers(4))})
        elif kind == "schema":
            options = [f"{text(3)} {place}" for place in range(2)]
            items.append({"context_options": options, "continuation": text(3), "gold": int(rng.integers(2))})
        else:
            items.append({"context": f"{begin} {text(2)}" if story else text(5), "continuation": text(1)})
    return items


def write_bundle(folder: Path, tasks: dict[str, tuple[str, int, int, list[dict[str, Any]]]]) -> Path:
    """Write a bundle of CORE: label → type, shots, baseline in percent, examples. Return the folder."""
    (folder / "eval_data" / "all").mkdir(parents=True)
    entries, baselines = [], ["Eval Task,Random baseline"]
    for label, (kind, shots, baseline, items) in tasks.items():
        data = f"all/{label}.jsonl"
        entries.append({"label": label, "icl_task_type": kind, "num_fewshot": [shots], "dataset_uri": data})
        baselines.append(f"{label},{baseline}")
        (folder / "eval_data" / data).write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text("\n".join(baselines))
    return folder
