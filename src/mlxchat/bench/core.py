"""Speed of CORE, compared with one example at a time as in nanochat, with the same model.

That loop computes every option of an example whole and all logits of all positions; nothing is shared or batched.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, TextIO
from zlib import crc32

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.text import Text

from mlxchat.bench.tables import make_table
from mlxchat.bench.timing import fill_zero_weights
from mlxchat.config.schema import Config
from mlxchat.engine.generate import Engine
from mlxchat.evals.core import Question, answer_examples, build_question, likeliest, mean_losses
from mlxchat.evals.core_bundle import Bundle, CoreTask
from mlxchat.evals.language_model import LanguageModel
from mlxchat.model.gpt import GPT
from mlxchat.model.initial import init_weights
from mlxchat.model.sizes import count_parameters, sizes_of
from mlxchat.ops.device import describe_device, prepare_machine
from mlxchat.planning.memory import forward_tokens
from mlxchat.runner.progress import Progress
from mlxchat.store.environment import peak_memory_bytes, versions

Examples = list[dict[str, Any]]
# Like ARC, HellaSwag, WinoGrande, Jeopardy and LAMBADA: type, shots, words of a question, of an answer, options.
_LIKE_CORE = {
    "choice_10_shots": ("multiple_choice", 10, 24, 4, 4),
    "choice": ("multiple_choice", 0, 40, 24, 4),
    "schema": ("schema", 0, 12, 8, 2),
    "language_10_shots": ("language_modeling", 10, 20, 2, 0),
    "language": ("language_modeling", 0, 75, 1, 0),
}


class Words:
    """A mock tokenizer: each word and punctuation mark is one token, chosen by hash."""

    def __init__(self, vocab_size: int) -> None:
        """Set the number of ids."""
        self._vocab_size = vocab_size
        self.bos = 0

    def encode(self, text: str) -> list[int]:
        """Return an id for each word and mark, with the space before it."""
        return [crc32(piece.encode()) % (self._vocab_size - 1) + 1 for piece in re.findall(r"\s?\w+|\s?\W", text)]

    def decode(self, ids: list[int]) -> str:
        """Return the ids as numbers; the original text is lost."""
        return " ".join(map(str, ids))


def measure_core(config: Config) -> dict[str, Any]:
    """Return what `mlxchat bench core --json` prints: plain data, examples per second of each task, both ways.

    Random weights, and the bundle's examples or made-up ones of the same shapes. Every task is measured in turns, one
    way and the other, `bench.steps` times after a round that is not counted; the medians are compared.
    """
    bench, machine = config.bench, config.machine
    prepare_machine(machine)
    sizes = sizes_of(config.model, config.architecture, bench.vocab_size)
    model = GPT(sizes)
    init_weights(model, config.seed)
    fill_zero_weights(model, config.seed)
    encoder: Any = Words(bench.vocab_size)
    batch_tokens = forward_tokens(machine, sizes)
    own = LanguageModel(Engine(model, encoder), batch_tokens=batch_tokens)
    tasks = list(_tasks(config))
    found: dict[str, dict[str, Any]] = {}
    rounds = 1 + bench.steps
    with Progress("bench", rounds * len(tasks), "rounds") as progress:
        for number, (task, items) in enumerate(tasks):
            seconds: dict[str, list[float]] = {"batched": [], "one_at_a_time": []}
            for turn in range(rounds):
                verdicts = {}
                for way, spent in seconds.items():
                    began = time.perf_counter()
                    if way == "batched":
                        results = [each for batch in answer_examples(own, task, items)
                                   for each in batch]  # fmt: skip
                        verdicts[way] = [each["verdict"] for each in sorted(results, key=lambda each: each["index"])]
                    else:
                        verdicts[way] = [answer_alone(model, encoder, task, items, i) for i in range(len(items))]
                    spent.append(time.perf_counter() - began)
                progress.update(number * rounds + turn + 1, measuring=task.label)
            speeds = {way: len(items) / median(spent[1:]) for way, spent in seconds.items()}
            found[task.label] = {
                "type": task.kind, "num_fewshot": task.num_fewshot, "num_examples": len(items),
                "examples_per_second": speeds["batched"], "one_at_a_time_per_second": speeds["one_at_a_time"],
                "ratio": speeds["batched"] / speeds["one_at_a_time"],
                "equal_verdicts": sum(map(bool.__eq__, *verdicts.values())),
            }  # fmt: skip
    both = [
        sum(task["num_examples"] / task[key] for task in found.values())
        for key in ("one_at_a_time_per_second", "examples_per_second")
    ]
    return {
        "kind": "core", "model": config.model.name, "architecture": config.architecture.name, "sizes": asdict(sizes),
        "num_parameters": count_parameters(sizes)["total"], "batch_tokens": batch_tokens,
        "device": describe_device(), "versions": versions(),
        "bundle": bench.bundle, "tasks": found, "ratio": both[0] / both[1], "peak_rss_bytes": peak_memory_bytes(),
    }  # fmt: skip


def answer_alone(model: GPT, encoder: Any, task: CoreTask, items: Examples, index: int) -> bool:
    """Return the verdict on one example as nanochat computes it: whole options, all logits."""
    question = build_question(task, items, index, encoder)
    longest = question.longest
    ids = mx.array([tokens + [encoder.bos] * (longest - len(tokens)) for tokens in question.sequences])
    logits = model(ids)
    following = mx.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
    losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    predictions = logits.argmax(-1)
    mx.eval(losses, predictions)
    return _verdict(question, np.asarray(losses), np.asarray(predictions))


def print_tables(record: dict[str, Any], stream: TextIO) -> None:
    """Print what `measure_core` returned."""
    console = Console(file=stream, highlight=False)
    sizes = record["sizes"]
    title = (
        f"CORE with {record['model']} {record['architecture']}: {sizes['num_layers']} layers of width "
        f"{sizes['width']}, vocabulary {sizes['vocab_size']}, up to {record['batch_tokens']} tokens at a time"
    )
    console.print(Text(title, style="bold"))
    console.print(Text(f"{record['device']['name']} ({record['device']['backend']}), examples per second"))
    table = make_table("task", "type", "shots", "batched", "one at a time", "ratio", left=(0, 1))
    for label, task in record["tasks"].items():
        table.add_row(
            label, task["type"], str(task["num_fewshot"]), f"{task['examples_per_second']:.1f}",
            f"{task['one_at_a_time_per_second']:.1f}", f"{task['ratio']:.1f} ×",
        )  # fmt: skip
    table.add_section()
    table.add_row("all of these", "", "", "", "", f"{record['ratio']:.1f} ×")
    console.print(table)


def _tasks(config: Config) -> Iterator[tuple[CoreTask, Examples]]:
    count = config.bench.core_examples
    if config.bench.bundle is not None:
        bundle = Bundle(Path(config.bench.bundle))
        for task in bundle.choose(config.bench.core_tasks):
            yield task, bundle.examples(task, max(count, task.num_fewshot + 1))
        return
    draw = random.Random(config.seed)

    def words(number: int) -> str:
        count = max(1, draw.randint(number * 2 // 3, number * 4 // 3))
        return " ".join(f"w{draw.randrange(5000)}" for _ in range(count))

    for label, (kind, shots, asked, answered, options) in _LIKE_CORE.items():
        if config.bench.core_tasks is not None and label not in config.bench.core_tasks:
            continue
        items: Examples = []
        for _ in range(max(count, shots + 1)):
            item: dict[str, Any] = {"gold": draw.randrange(max(1, options))}
            if kind == "multiple_choice":
                item |= {"query": words(asked), "choices": [words(answered) for _ in range(options)]}
            elif kind == "schema":
                begin = words(asked)
                item |= {"context_options": [f"{begin} {words(1)}" for _ in range(options)]}
                item |= {"continuation": words(answered)}
            else:
                item |= {"context": words(asked), "continuation": words(answered)}
            items.append(item)
        task = CoreTask(label=label, kind=kind, data="", num_fewshot=shots, delimiter=" ", baseline=0.0)
        yield task, items


def _verdict(question: Question, losses: np.ndarray[Any, Any], predictions: np.ndarray[Any, Any]) -> bool:
    spans = [row.places for row in question.rows()]
    if question.gold is None:
        expected = question.sequences[0][question.starts[0] :]
        return bool(expected) and predictions[0, spans[0]].tolist() == expected
    return likeliest(mean_losses([row[span] for row, span in zip(losses, spans, strict=True)])) == question.gold
