"""core_*.json and core_model*.safetensors: the CORE evaluation, and the sizes of the models that it uses."""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from comparison import Comparison, Quantity, exact, largest, same, scaled_distance
from parity_file import ParityFile

from kit.training import make_context
from mlxchat.config.schema import CoreConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.batch import common_prefix
from mlxchat.engine.generate import Engine
from mlxchat.evals.core import (
    Question,
    answer_examples,
    crop,
    draw_shots,
    evaluate_core,
    likeliest,
    mean_losses,
    render_prompts,
    tokenize_prompts,
)
from mlxchat.evals.core_bundle import Bundle, CoreTask
from mlxchat.evals.language_model import LanguageModel
from mlxchat.model.gpt import GPT
from mlxchat.model.sizes import count_parameters
from mlxchat.runner.progress import Progress

LOSS = 1e-5
ACCURACY = 1e-6  # nanochat computes them in float32
VARIANTS = ("oct2025", "jul2026")
_BATCH_TOKENS = 3000  # enough for several batches per task


def parameters(file: ParityFile) -> Iterator[Comparison]:
    """Check that a model has as many parameters as its sizes say."""
    if file.path.suffix == ".safetensors":
        file.model("")
        weights = sum(value.size for value in file.weights("").values())
        yield Comparison("number of parameters", abs(count_parameters(file.sizes)["total"] - weights), 0)


def evaluation(file: ParityFile) -> Iterator[Comparison]:
    """Compare every part of CORE that the file holds."""
    for key, compare in _COMPARED.items():
        if key in file.json:
            yield from compare(file)


def _prompts(file: ParityFile) -> Iterator[Comparison]:
    tokenizer, prompts, tokens, spans, refused = file.tokenizer(), [], [], [], []
    for number, case in enumerate(file.json["render"]):
        task = _task(case["task_type"], case["continuation_delimiter"], 0)
        got = render_prompts(task, case["item"], case["fewshot_examples"])
        prompts.append((f"case {number}", got, case["prompts"]))
        sequences, starts = tokenize_prompts(task.kind, got, tokenizer)
        if "batch_error" in case:
            shorter = 1 + len(tokenizer.encode(got[0]))
            refused.append((f"case {number}", starts[0] < shorter or starts[0] == len(sequences[0]), True))
            continue
        tokens.append((f"case {number}", sequences, case["tokens"]))
        spans.append((f"case {number}", (starts, [len(each) for each in sequences]), (case["start"], case["end"])))
    yield same("prompts of CORE", prompts)
    yield same("tokens of the prompts", tokens)
    yield same("scored positions", spans)
    yield same("prompts whose tokens do not begin the whole", refused)


def _common_lengths(file: ParityFile) -> Iterator[Comparison]:
    cases = file.json["find_common_length"]
    yield same(
        "common beginnings and ends",
        (
            (
                str(case["sequences"])[:40],
                (common_prefix(case["sequences"]), common_prefix([each[::-1] for each in case["sequences"]])),
                (case["left"], case["right"]),
            )
            for case in cases
        ),
    )


def _draws(file: ParityFile) -> Iterator[Comparison]:
    yield same(
        "draws of examples",
        (
            (f"{case['k']} of {case['num_items']}", draw_shots(case["index"], case["num_items"], case["k"]),
             case["indices"])
            for case in file.json["fewshot_draws"]
        ),
    )  # fmt: skip


def _too_few(file: ParityFile) -> Iterator[Comparison]:
    case = file.json["too_few_items_for_the_shots"]
    try:
        draw_shots(0, case["num_items"], case["num_fewshot"])
        error = None
    except ValueError as raised:
        error = type(raised).__name__
    yield same("too few examples", [("error", error, case["error"])])


def _tasks(file: ParityFile) -> Iterator[Comparison]:
    tokenizer = file.tokenizer()
    rendered: list[tuple[str, Any, Any]] = []
    for entry in file.json["tasks"]:
        task, items = _entry(entry), entry["data"]
        for case in entry["rendered"]:
            shots = draw_shots(case["index"], len(items), task.num_fewshot)
            prompts = render_prompts(task, items[case["index"]], [items[place] for place in shots])
            sequences, starts = tokenize_prompts(task.kind, prompts, tokenizer)
            expected = (case["fewshot_indices"], case["prompts"], case["tokens"], case["start"], case["end"])
            got = (shots, prompts, sequences, starts, [len(each) for each in sequences])
            rendered.append((f"{task.label} {case['index']}", got, expected))
    yield same("prompts of the tasks", rendered)
    for variant in VARIANTS:
        model = _model(file.core_model(variant), tokenizer)
        verdicts, losses, predicted, accuracy = [], {}, [], {}
        for entry in file.json["tasks"]:
            task = _entry(entry)
            batches = answer_examples(model, task, entry["data"])
            records = {record["index"]: record for batch in batches for record in batch}
            for case in entry[variant]["results"]:
                record, name = records[case["index"]], f"{task.label} {case['index']}"
                verdicts.append((name, record["verdict"], case["correct"]))
                if "mean_losses" in case:
                    losses[name] = scaled_distance(record["details"]["losses"], case["mean_losses"])
                else:
                    predicted.append((name, record["output"], tokenizer.decode(case["predicted_tokens"])))
            mean = float(np.mean([record["verdict"] for record in records.values()]))
            accuracy[task.label] = abs(mean - entry[variant]["accuracy"])
        yield same(f"verdicts, {variant}", verdicts)
        yield largest(f"losses of options, {variant}", losses, LOSS)
        yield same(f"predicted tokens, {variant}", predicted)
        yield largest(f"accuracies, {variant}", accuracy, ACCURACY)


def _cropped(file: ParityFile) -> Iterator[Comparison]:
    tokenizer = file.tokenizer()
    entries = {entry["label"]: entry for entry in file.json["tasks"]}
    kept, verdicts = [], []
    for case in file.json["cropping"]:
        entry = entries[case["label"]]
        task, items = _entry(entry), entry["data"]
        for result in case["results"]:
            index, name = result["index"], f"{task.label} {result['index']}"
            shots = [items[place] for place in draw_shots(index, len(items), task.num_fewshot)]
            sequences, starts = tokenize_prompts(task.kind, render_prompts(task, items[index], shots), tokenizer)
            sequences, starts, _ = crop(sequences, starts, case["max_seq_len"])
            gold = None if task.kind == "language_modeling" else items[index]["gold"]
            question = Question(index=index, sequences=sequences, starts=starts, gold=gold)
            if "error" not in result:
                kept.append((name, sequences, result["tokens"]))
            for variant in VARIANTS:
                got = _verdict(_model(file.core_model(variant), tokenizer), question)
                # Where nanochat fails, ours still has a verdict, and any will do.
                verdicts.append((f"{name}, {variant}", got, result.get(f"{variant}_correct", got)))
    yield same("cropped prompts", kept)
    yield same("verdicts on cropped prompts", verdicts)


def _suite(file: ParityFile) -> Iterator[Comparison]:
    tokenizer, errors = file.tokenizer(), {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "eval_bundle"
        _write_bundle(bundle, file.json["tasks"])
        for variant in VARIANTS:
            for number, case in enumerate(file.json["suite"][variant]):
                place = Path(folder) / f"{variant}{number}"
                found, _ = evaluate_core(
                    make_context(place), _model(file.core_model(variant), tokenizer), CoreConfig(bundle=str(bundle)),
                    max_per_task=case["max_per_task"], work=place / "core", progress=_silent,
                )  # fmt: skip
                name = f"{variant}, {case['max_per_task'] or 'all'} of each"
                for label, score in found["tasks"].items():
                    errors[f"{label}, {name}"] = abs(score["accuracy"] - case["results"][label])
                    errors[f"{label} centred, {name}"] = abs(score["centered"] - case["centered_results"][label])
                errors[f"CORE, {name}"] = abs(found["core"] - case["core_metric"])
    yield largest("the CORE metric", errors, ACCURACY)


def _shuffled(file: ParityFile) -> Iterator[Comparison]:
    case, wrong = file.json["suite_shuffle"], []
    orders = {int(key.removeprefix("order_")): value for key, value in case.items() if key.startswith("order_")}
    for count, order in orders.items():
        with tempfile.TemporaryDirectory() as folder:
            data = [{"context": str(place), "continuation": "x"} for place in range(count)]
            meta = {"task_type": "language_modeling", "num_fewshot": 0, "continuation_delimiter": " "}
            entry = {"label": "numbers", "task_meta": meta, "random_baseline_percent": 0, "data": data}
            _write_bundle(Path(folder), [entry])
            bundle = Bundle(Path(folder))
            if [int(item["context"]) for item in bundle.examples(bundle.tasks[0])] != order:
                wrong.append(f"{count} items")
    yield exact("the order of a suite's items", wrong, len(orders))


_COMPARED: dict[str, Callable[[ParityFile], Iterator[Comparison]]] = {
    "render": _prompts,
    "find_common_length": _common_lengths,
    "fewshot_draws": _draws,
    "too_few_items_for_the_shots": _too_few,
    "tasks": _tasks,
    "cropping": _cropped,
    "suite": _suite,
    "suite_shuffle": _shuffled,
}
QUANTITIES: tuple[Quantity, ...] = (parameters, evaluation)


def _task(kind: str, delimiter: str, shots: int, label: str = "", baseline: float = 0.0) -> CoreTask:
    return CoreTask(label=label, kind=kind, data="", num_fewshot=shots, delimiter=delimiter, baseline=baseline)


def _entry(entry: dict[str, Any]) -> CoreTask:
    meta = entry["task_meta"]
    return _task(meta["task_type"], meta["continuation_delimiter"], meta["num_fewshot"], entry["label"])


def _model(gpt: GPT, tokenizer: Tokenizer) -> LanguageModel:
    return LanguageModel(Engine(gpt, tokenizer), batch_tokens=_BATCH_TOKENS)


def _verdict(model: LanguageModel, question: Question) -> bool:
    if question.gold is not None:
        return likeliest(mean_losses([found[0] for found in model.score(question.rows())])) == question.gold
    ((predicted,),) = model.score(question.rows(), ("likeliest",))
    return bool(predicted.tolist() == question.sequences[0][question.starts[0] :])


def _write_bundle(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "eval_data").mkdir(parents=True)
    described = [
        {
            "label": entry["label"],
            "dataset_uri": f"{entry['label']}.jsonl",
            "num_fewshot": [entry["task_meta"]["num_fewshot"]],
            "icl_task_type": entry["task_meta"]["task_type"],
            "continuation_delimiter": entry["task_meta"]["continuation_delimiter"],
        }
        for entry in entries
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": described}))  # JSON is YAML
    rows = [f"{entry['label']},{entry['random_baseline_percent']}" for entry in entries]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Random baseline", *rows]) + "\n")
    for entry in entries:
        lines = "".join(json.dumps(item) + "\n" for item in entry["data"])
        (folder / "eval_data" / f"{entry['label']}.jsonl").write_text(lines)


def _silent(total: int, unit: str) -> Progress:
    return Progress("core", total, unit, stream=io.StringIO())
