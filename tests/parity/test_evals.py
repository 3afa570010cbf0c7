"""CORE, bits per byte, and greedy decoding of both snapshots."""

import math
from typing import Any

import numpy as np
import pytest

from kit.text import write_bundle
from mlxchat.data.packing import Row
from mlxchat.engine.generate import Engine
from mlxchat.evals.bpb import text_loss
from mlxchat.evals.core import (
    Bundle,
    CoreTask,
    answer_examples,
    draw_shots,
    render_prompts,
    tokenize_prompts,
)
from parity.values import VARIANTS, Values, assert_same, assert_within, distance, of_files

LOSS = 1e-5
ACCURACY = 1e-6  # nanochat computes them in float32
BITS = 1e-6
each_file = of_files("core_*.json")
each_losses = of_files("bpb_*.json")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def engine_of(values: Values, variant: str) -> Engine:
    """Return an engine that scores in several batches for each task."""
    return Engine(values.core_model(variant), values.tokenizer, batch_tokens=3000)


def task_of(kind: str, delimiter: str, shots: int = 0, label: str = "") -> CoreTask:
    return CoreTask(label=label, kind=kind, data="", num_fewshot=shots, delimiter=delimiter, baseline=0.0)


def task_of_entry(entry: dict[str, Any]) -> CoreTask:
    meta = entry["task_meta"]
    return task_of(meta["task_type"], meta["continuation_delimiter"], meta["num_fewshot"], entry["label"])


def prompts_of(task: CoreTask, items: list[Any], index: int, values: Values) -> tuple[Any, ...]:
    """Return the drawn examples, the prompts, and their tokens with the first scored positions."""
    shots = draw_shots(index, len(items), task.num_fewshot)
    prompts = render_prompts(task, items[index], [items[place] for place in shots])
    return (shots, prompts, *tokenize_prompts(task.kind, prompts, values.tokenizer))


@each_file
def test_prompts_tokens_and_draws_of_core(values):
    pairs = []
    for number, case in enumerate(values.json["render"]):
        task = task_of(case["task_type"], case["continuation_delimiter"])
        prompts = render_prompts(task, case["item"], case["fewshot_examples"])
        pairs.append((number, prompts, case["prompts"]))
        tokens, starts = tokenize_prompts(task.kind, prompts, values.tokenizer)
        if "batch_error" not in case:
            expected = case["tokens"], case["start"], case["end"]
            pairs.append((number, (tokens, starts, [len(each) for each in tokens]), expected))
    for entry in values.json["tasks"]:
        for case in entry["rendered"]:
            shots, prompts, tokens, starts = prompts_of(task_of_entry(entry), entry["data"], case["index"], values)
            expected = (case["fewshot_indices"], case["prompts"], case["tokens"], case["start"], case["end"])
            got = (shots, prompts, tokens, starts, [len(each) for each in tokens])
            pairs.append((f"{entry['label']} {case['index']}", got, expected))
    for case in values.json["fewshot_draws"]:
        pairs.append((case, draw_shots(case["index"], case["num_items"], case["k"]), case["indices"]))
    assert_same(pairs)


@each_file
@each_variant
def test_answers_of_core(values, variant):
    """Verdicts, losses of options, predicted tokens and accuracies."""
    model, same, losses, accuracies = engine_of(values, variant), [], {}, {}
    for entry in values.json["tasks"]:
        task = task_of_entry(entry)
        records = {record["index"]: record for batch in answer_examples(model, task, entry["data"]) for record in batch}
        for case in entry[variant]["results"]:
            record, name = records[case["index"]], f"{task.label} {case['index']}"
            same.append((name, record["verdict"], case["correct"]))
            if "mean_losses" in case:
                losses[name] = distance(record["details"]["losses"], case["mean_losses"])
            else:
                same.append((name, record["output"], values.tokenizer.decode(case["predicted_tokens"])))
        mean = float(np.mean([record["verdict"] for record in records.values()]))
        accuracies[task.label] = abs(mean - entry[variant]["accuracy"])
    assert_same(same)
    assert_within(LOSS, losses)
    assert_within(ACCURACY, accuracies)


@each_file
def test_order_of_a_suite(values, tmp_path):
    for key, order in values.json["suite_shuffle"].items():
        if key.startswith("order_"):
            data = [{"context": str(place), "continuation": "x"} for place in range(len(order))]
            bundle = Bundle(write_bundle(tmp_path / key, {"numbers": ("language_modeling", 0, 0, data)}))
            assert [int(item["context"]) for item in bundle.examples(bundle.tasks[0])] == order


def rows_of(values: Values, names: list[str]) -> list[Row]:
    batches = [values.json["batches"][name] for name in names]
    return [
        (np.array(ids, np.int32), np.array(targets, np.int32))
        for batch in batches
        for ids, targets in zip(batch["ids"], batch["targets"], strict=True)
    ]


def token_bytes(values: Values, rule: str) -> Any:
    """Return the bytes of each token: its raw bytes as ours, or those of the decoded string as in oct2025."""
    tokenizer = values.tokenizer
    if rule == "raw_bytes":
        return tokenizer.token_bytes
    sizes = enumerate(tokenizer.token_bytes)
    return np.array([len(tokenizer.decode([id_]).encode()) if count else 0 for id_, count in sizes], np.int32)


@each_losses
@each_variant
def test_bits_per_byte(values, variant):
    model, errors = values.core_model(variant), {}
    for number, case in enumerate(values.json["cases"]):
        rows, table = rows_of(values, case["batches"][: case["steps"]]), token_bytes(values, case["token_bytes"])
        assert sum(int(table[targets[targets >= 0]].sum()) for _, targets in rows) == case["total_bytes"]
        got = text_loss(model, rows, table, micro_tokens=1000).bits_per_byte
        expected = case[variant]["bpb"] if variant in case else None
        expected = math.inf if case["infinite"] or expected is None else expected
        errors[str(number)] = 0.0 if got == expected else distance(got, expected)
    assert_within(BITS, errors)


# If two logits are closer than this, rounding decides, and either token is right.
TIE = 4e-4

each_engine = of_files("engine_*.json")


@each_engine
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuations(values, variant):
    engine, pairs = Engine(values.core_model(variant), values.tokenizer), []
    for number, case in enumerate(values.json["greedy"][variant]):
        if case["min_top2_logit_gap"] >= TIE:
            (got,) = engine.complete([case["prompt"]], max_new_tokens=case["max_tokens"])
            pairs.append((number, got.ids, case["tokens"]))
    assert_same(pairs)
