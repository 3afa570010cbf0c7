"""CORE: the mean centred accuracy of a base model on 22 tasks (DCLM's metric), and its data, nanochat's eval bundle.

Counterpart of nanochat/core_eval.py, with its prompts, draws, spans and verdicts. Examples are batched by length.
Results are journaled per batch, so a killed evaluation resumes. The same way of choosing an option measures multiple
choice for models that cannot chat. A sequence begins with <|bos|>. Position p is predicted from p − 1.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlxchat.config.schema import CoreConfig
from mlxchat.data.tokens import open_item
from mlxchat.engine.batch import common_prefix
from mlxchat.engine.generate import Engine
from mlxchat.engine.third_party import AnyTokenizer
from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.evals.examples import Example, answer_all
from mlxchat.evals.scores import Score, mean_centered, mean_centered_stderr
from mlxchat.hub import client
from mlxchat.model.scoring import Floats, ScoredRow, continuation
from mlxchat.ops.device import round_tokens
from mlxchat.ops.loss import ScoreKind
from mlxchat.runner.context import Context
from mlxchat.runner.process import Progress
from mlxchat.store.fingerprint import hash_file
from mlxchat.tasks.base import Task

# Examples tokenized at a time, which bounds memory.
_WINDOW_EXAMPLES = 512
FEWSHOT_SEED = 1234


SHUFFLE_SEED = 1337
_LABEL = re.compile(r"\w[\w.-]*")  # also the name of the task's journal, which must not leave its folder


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One of CORE's tasks."""

    label: str
    kind: str  # multiple_choice, schema or language_modeling
    data: str  # path of its .jsonl below eval_data/
    num_fewshot: int
    delimiter: str  # between a question and its continuation
    baseline: float  # accuracy of guessing, 0 … 1

    def options(self, item: dict[str, Any]) -> list[str]:
        """Return the options of an example; language modelling has none."""
        return list(item.get("choices" if self.kind == "multiple_choice" else "context_options", []))


def open_bundle(ctx: Context, config: CoreConfig) -> Bundle:
    """Return CORE's bundle; fetch it if it has a URL, and record that once in ctx.externals."""
    if "://" not in config.bundle:
        return Bundle(Path(config.bundle))
    path = client.fetch_url(config.bundle, sha256=config.sha256)
    source = {"name": "eval_bundle", **client.record(path)}
    ctx.externals += [source] if source not in ctx.externals else []
    return Bundle(path)


class Bundle:
    """The bundle's tasks and their examples. Every method raises DataError if a file is absent or malformed."""

    def __init__(self, path: Path) -> None:
        """Open a zip or a folder, with or without a top folder `eval_bundle/`."""
        self.path = path
        try:
            top = path if path.is_dir() else zipfile.Path(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a zip or folder ({error}); expected nanochat's eval bundle") from None
        self._root = top / "eval_bundle" if (top / "eval_bundle" / "core.yaml").is_file() else top

    @cached_property
    def sha256(self) -> str:
        """Hash of the zip; of a folder, of the names and contents of the files that CORE reads."""
        if self.path.is_file():
            return hash_file(self.path)
        digest = hashlib.sha256()
        for name in ["core.yaml", "eval_meta_data.csv", *sorted(f"eval_data/{task.data}" for task in self.tasks)]:
            digest.update(f"{name}\0{hashlib.sha256(self._read(name).encode()).hexdigest()}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tasks(self) -> list[CoreTask]:
        """All tasks, in the bundle's order."""
        described, table = self._read("core.yaml"), self._read("eval_meta_data.csv")
        try:
            rows = csv.DictReader(io.StringIO(table))
            baselines = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in rows}
            tasks = [
                CoreTask(
                    label=str(task["label"]),
                    kind=str(task["icl_task_type"]),
                    data=str(task["dataset_uri"]),
                    num_fewshot=int(task["num_fewshot"][0]),
                    delimiter=str(task.get("continuation_delimiter", " ")),
                    baseline=baselines[task["label"]],
                )
                for task in yaml.safe_load(described)["icl_tasks"]
            ]
        except (KeyError, TypeError, ValueError, IndexError, yaml.YAMLError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.path}: core.yaml and eval_meta_data.csv do not describe tasks ({reason})") from None
        if wrong := [task.label for task in tasks if not _LABEL.fullmatch(task.label)]:
            raise DataError(f"{self.path}: {wrong[0]!r} is no name of a task")
        return tasks

    def choose(self, labels: list[str] | None) -> list[CoreTask]:
        """Return the tasks with these labels, in the bundle's order; None: all."""
        known = [task.label for task in self.tasks]
        for label in labels or ():
            if label not in known:
                raise DataError(f"{self.path}: has no task {label!r}.{suggest(label, known)} Tasks: {', '.join(known)}")
        return [task for task in self.tasks if labels is None or task.label in labels]

    def examples(self, task: CoreTask, max_per_task: int | None = None) -> list[dict[str, Any]]:
        """Return a task's examples in nanochat's order: shuffled with a fixed seed, then the first `max_per_task`."""
        lines = self._read(f"eval_data/{task.data}").split("\n")
        try:
            items: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise DataError(f"{self.path}: {task.data} is not JSON by lines ({error})") from None
        random.Random(SHUFFLE_SEED).shuffle(items)
        items = items[:max_per_task]
        if len(items) <= task.num_fewshot:
            shown = f"{self.path}: {task.label} shows {task.num_fewshot} other examples before each one"
            raise DataError(f"{shown} and has {len(items)} in all; use at least {task.num_fewshot + 1} per task")
        return items

    def _read(self, name: str) -> str:
        try:
            return (self._root / name).read_bytes().decode()
        except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path}: cannot read {name} of the eval bundle ({error})") from None


def evaluate_core(
    ctx: Context, engine: Engine, config: CoreConfig, *, max_per_task: int | None, work: Path,
    progress: Callable[[int, str], Progress] | None = None,
) -> tuple[dict[str, Any], list[Example]]:  # fmt: skip
    """Return a base model's results on CORE as data of scores.json, and its examples with their tasks.

    CORE and its standard error over examples, for fixed tasks, are None if tasks were left out. Prompts longer than the
    model's context are computed whole by "extend" if the model is ours, as in nanochat; "cut" drops their beginning.
    Shots are drawn from the `max_per_task` examples of a task. The journals in `work` are kept between attempts.
    """
    bundle, most = open_bundle(ctx, config), engine.context_tokens
    chosen = bundle.choose(config.tasks)
    limit = most if config.long_prompts == "cut" or not engine.is_ours else None
    long_prompts = "extend" if limit is None else "cut"
    about = {"max_per_task": max_per_task, "bundle_sha256": bundle.sha256, "long_prompts": long_prompts}
    about |= {"context_tokens": most}
    scores, examples = dict[str, Score](), list[Example]()
    tasks: dict[str, dict[str, Any]] = {}
    for number, task in enumerate(chosen, 1):
        items, path = bundle.examples(task, max_per_task), work / f"{task.label}.jsonl"
        unit = f"examples of {task.label}, CORE's task {number} of {len(chosen)}"
        score, records = _score(ctx, engine, task, items, path, about, unit, limit, progress)
        examples += [{"task": f"core/{task.label}", **record} for record in records]
        scores[task.label] = score
        tasks[task.label] = {
            **score.to_dict(), "num_fewshot": task.num_fewshot, "type": task.kind, "baseline": task.baseline,
            "extended": sum(record["tokens"] > most for record in records), "cropped": score.cropped,
        }  # fmt: skip
    whole = list(scores.values()) if len(chosen) == len(bundle.tasks) else []
    return {"core": mean_centered(whole), "stderr": mean_centered_stderr(whole), **about, "tasks": tasks}, examples


def measure_core(ctx: Context, engine: Engine, examples: list[Example]) -> dict[str, Any] | None:
    """Return a model's results on CORE's tasks as data of scores.json, and add examples; None: eval.core is null."""
    config = ctx.config.eval.core
    if config is None:
        return None
    result, answered = evaluate_core(ctx, engine, config, max_per_task=config.max_per_task, work=ctx.work / "core")
    examples += answered
    if result["core"] is not None:
        ctx.metrics["core"] = result["core"]
    return result


def measure_plain_choice(ctx: Context, engine: Engine, examples: list[Example]) -> dict[str, Any]:
    """Return a model's scores on `eval.base_tasks` by name as data of scores.json; accuracies become metrics.

    The prompt is that of ARC in CORE without shots: "Question: …", and on the next line "Answer: " and the option.
    Examples get theirs added. Raises ConfigError if a task does not name its options.
    """
    tasks = {name: open_item(ctx, item) for name, item in sorted(ctx.config.eval.base_tasks.items())}
    asked = {name: _questions(name, task) for name, task in tasks.items()}
    limit, scores = None if engine.is_ours else engine.context_tokens, {}
    for name, items in asked.items():
        plain: dict[str, Any] = {"kind": "multiple_choice", "data": "", "num_fewshot": 0, "delimiter": "\nAnswer: "}
        task = CoreTask(label=name, baseline=tasks[name].chance, **plain)
        path, about = ctx.work / "plain" / f"{name}.jsonl", {"questions": len(items)}
        score, records = _score(ctx, engine, task, items, path, about, f"questions of {name}", limit)
        examples += [{"task": name, **record} for record in records]
        scores[name], ctx.metrics[name] = score.to_dict(), score.accuracy
    return scores


def _questions(name: str, task: Task) -> list[dict[str, Any]]:
    found = [task[index] for index in range(len(task))]
    if any("choices" not in each for each in found):
        raise ConfigError(f"eval.base_tasks.{name}: a base model needs options to choose from, and this task has none")
    golds = [each["letters"].index(each["answer"]) for each in found]
    return [
        {"query": f"Question: {each['question']}", "choices": each["choices"], "gold": gold}
        for each, gold in zip(found, golds, strict=True)
    ]


def _score(
    ctx: Context, engine: Engine, task: CoreTask, items: list[dict[str, Any]], path: Path, about: dict[str, Any],
    unit: str, limit: int | None, progress: Callable[[int, str], Progress] | None = None,
) -> tuple[Score, list[Example]]:  # fmt: skip
    answer = partial(answer_examples, engine, task, items, limit=limit)
    records = answer_all(ctx, path, about, len(items), unit, answer, progress)
    cropped = sum(record["details"]["cropped"] for record in records)
    return Score.of_examples([records], kind=task.kind, chance=task.baseline, cropped=cropped), records


def answer_examples(
    engine: Engine, task: CoreTask, items: list[dict[str, Any]], known: Container[int] = (), *,
    limit: int | None = None,
) -> Iterator[list[Example]]:  # fmt: skip
    """Yield the results of a task's examples per batch; completely known batches are skipped.

    Batches do not depend on `known`, so resuming gives identical results. Prompts above `limit` tokens are cut.
    """
    kind: ScoreKind = "likeliest" if task.kind == "language_modeling" else "losses"
    for start in range(0, len(items), _WINDOW_EXAMPLES):
        window = range(start, min(start + _WINDOW_EXAMPLES, len(items)))
        if all(index in known for index in window):
            continue
        questions = [build_question(task, items, index, engine.tokenizer, limit) for index in window]
        for batch in _batches(questions, engine.batch_tokens):
            if any(question.index not in known for question in batch):
                found = iter(engine.score([row for question in batch for row in question.rows()], (kind,)))
                yield [
                    _judge(task, items, question, [next(found)[0] for _ in question.sequences], engine)
                    for question in batch
                ]


def _batches(questions: list[Question], batch_tokens: int) -> Iterator[list[Question]]:
    """Yield questions of similar length whose sequences fit into a forward pass, the longest first."""
    batch: list[Question] = []
    rows = 0
    for question in sorted(questions, key=lambda each: -each.longest):
        rows += len(question.sequences)
        if batch and rows * round_tokens(batch[0].longest) > batch_tokens:
            yield batch
            batch, rows = [], len(question.sequences)
        batch.append(question)
    yield batch


def _judge(
    task: CoreTask, items: list[dict[str, Any]], question: Question, found: list[Floats], engine: Engine
) -> Example:
    """Return an example's record with its verdict; `found`: predicted ids or losses of each sequence."""
    item = items[question.index]
    shots = draw_shots(question.index, len(items), task.num_fewshot)
    details: dict[str, Any] = {"shots": shots, "cropped": question.cropped}
    if question.gold is None:
        predicted, expected = found[0].astype(int).tolist(), question.sequences[0][question.starts[0] :]
        prompt, wanted = render_prompts(task, item, [])[0], str(item["continuation"])
        output, verdict = engine.tokenizer.decode(predicted), bool(expected) and predicted == expected
    else:
        # None where no token of an option is scored.
        details["losses"] = [float(np.mean(each, dtype=np.float64)) if len(each) else None for each in found]
        chosen, options = likeliest(details["losses"]), task.options(item)
        prompt = str(item["query"] if task.kind == "multiple_choice" else item["continuation"])
        output, wanted, verdict = str(options[chosen]), str(options[question.gold]), chosen == question.gold
    return {
        "index": question.index, "seed": None, "prompt": prompt, "output": output, "expected": wanted,
        "verdict": verdict, "tokens": question.longest, "details": details,
    }  # fmt: skip


def likeliest(losses: Sequence[float | None]) -> int:
    """Return the first option with the lowest mean loss; as in nanochat, the first one wins if it has no loss."""
    if losses[0] is None:
        return 0
    return min((loss, place) for place, loss in enumerate(losses) if loss is not None)[1]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One example, ready for a model."""

    index: int  # place among the task's examples
    sequences: list[list[int]]  # Token ids of each option; one sequence for language modelling
    starts: list[int]  # first scored position of each sequence
    gold: int | None  # the right option; None: the continuation itself is expected
    cropped: bool = False  # whether tokens were left out at the front

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    def rows(self) -> list[ScoredRow]:
        """Return each sequence with its scored tokens."""
        pairs = zip(self.sequences, self.starts, strict=True)
        return [continuation(tokens, max(1, start)) for tokens, start in pairs]


def draw_shots(index: int, count: int, shots: int) -> list[int]:
    """Return the indices of the few-shot examples for example `index` of `count`, as nanochat draws them."""
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(count - 1), shots)
    return [place + (place >= index) for place in drawn]


def render_prompts(task: CoreTask, item: dict[str, Any], shots: list[dict[str, Any]]) -> list[str]:
    """Return the prompt of each option; of language modelling, the prompt without and with the continuation."""
    delimiter = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n" for shot in shots)
        return [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        right = [f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}\n\n" for shot in shots]
        return [f"{''.join(right)}{each}{delimiter}{item['continuation']}" for each in item["context_options"]]
    before = "".join(f"{str(shot['context']).strip()}{delimiter}{shot['continuation']}\n\n" for shot in shots)
    without = f"{before}{str(item['context']).strip()}{delimiter}"
    # Stripped, so that its tokens are a prefix of the other's.
    return [without.strip(), f"{without}{item['continuation']}"]


def tokenize_prompts(kind: str, prompts: list[str], encoder: AnyTokenizer) -> tuple[list[list[int]], list[int]]:
    """Return the sequences to compute and the first scored position of each.

    Multiple choice scores from where the options part; schemas score the common end; language modelling scores what the
    prompt without the continuation does not cover: from where both differ, where nanochat fails if that is earlier.
    """
    sequences = [[encoder.bos, *encoder.encode(prompt)] for prompt in prompts]
    if kind == "language_modeling":
        return sequences[1:], [common_prefix(sequences)]
    if kind == "schema":
        length = common_prefix([sequence[::-1] for sequence in sequences])
        return sequences, [len(sequence) - length for sequence in sequences]
    return sequences, [common_prefix(sequences)] * len(sequences)


def crop(sequences: list[list[int]], starts: list[int], limit: int) -> tuple[list[list[int]], list[int], bool]:
    """Return sequences of at most `limit` tokens, their first scored positions, and whether anything was cut.

    Tokens are dropped at the front, of each option its own excess, as in nanochat; scored tokens that are dropped do
    not count. At least one token of context and one to score remain.
    """
    cuts = [min(max(0, len(sequence) - limit), max(0, len(sequence) - 2)) for sequence in sequences]
    kept = [sequence[cut:] for sequence, cut in zip(sequences, cuts, strict=True)]
    return kept, [max(1, start - cut) if cut else start for start, cut in zip(starts, cuts, strict=True)], any(cuts)


def build_question(
    task: CoreTask, items: list[dict[str, Any]], index: int, encoder: AnyTokenizer, limit: int | None = None
) -> Question:
    """Return example `index` of a task with its shots before it, cropped to `limit` tokens."""
    shots = [items[place] for place in draw_shots(index, len(items), task.num_fewshot)]
    item = items[index]
    sequences, starts = tokenize_prompts(task.kind, render_prompts(task, item, shots), encoder)
    cropped = False
    if limit is not None:
        sequences, starts, cropped = crop(sequences, starts, limit)
    gold = None if task.kind == "language_modeling" else int(item["gold"])
    return Question(index=index, sequences=sequences, starts=starts, gold=gold, cropped=cropped)
