"""CORE, bits per byte, answers by letters' logits, ChatCORE, and executed programs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_model import losses_of
from values import VARIANTS, Values, absolute, assert_same, assert_within, distance, of_files

from kit.training import make_context
from mlxchat.config.schema import CoreConfig
from mlxchat.data.conversation import render_for_completion
from mlxchat.data.packing import Row
from mlxchat.engine.generate import Engine
from mlxchat.evals.bpb import mean_loss, text_loss
from mlxchat.evals.chat import Answering, evaluate_task
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
from mlxchat.evals.scores import CHATCORE_SETS, Score, chatcore
from mlxchat.model.sizes import count_parameters
from mlxchat.sandbox.programs import run_program
from mlxchat.tasks.benchmarks import assemble_program

LOSS = 1e-5
ACCURACY = 1e-6  # nanochat computes them in float32
BITS = 1e-6
LOGITS = 1e-4

each_file = of_files("core_*.json")
each_losses = of_files("bpb_*.json")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def language_model(values: Values, variant: str) -> LanguageModel:
    """Return a model that scores in several batches for each task."""
    return LanguageModel(Engine(values.core_model(variant), values.tokenizer), batch_tokens=3000)


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


def write_bundle(folder: Path, entries: list[dict[str, Any]]) -> Path:
    """Write tasks as nanochat's evaluation bundle."""
    (folder / "eval_data").mkdir(parents=True)
    described, rows = [], ["Eval Task,Random baseline"]
    for entry in entries:
        meta, label = entry["task_meta"], entry["label"]
        described.append({
            "label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [meta["num_fewshot"]],
            "icl_task_type": meta["task_type"], "continuation_delimiter": meta["continuation_delimiter"],
        })  # fmt: skip
        rows.append(f"{label},{entry['random_baseline_percent']}")
        lines = "".join(json.dumps(item) + "\n" for item in entry["data"])
        (folder / "eval_data" / f"{label}.jsonl").write_text(lines)
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": described}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
    return folder


@of_files("core_model*.safetensors")
def test_number_of_parameters(values):
    values.model("")
    assert count_parameters(values.sizes)["total"] == sum(value.size for value in values.tensors.values())


@each_file
def test_prompts_tokens_and_draws_of_core(values):
    pairs = []
    for number, case in enumerate(values.section("render")):
        task = task_of(case["task_type"], case["continuation_delimiter"])
        prompts = render_prompts(task, case["item"], case["fewshot_examples"])
        pairs.append((number, prompts, case["prompts"]))
        tokens, starts = tokenize_prompts(task.kind, prompts, values.tokenizer)
        if "batch_error" not in case:
            expected = case["tokens"], case["start"], case["end"]
            pairs.append((number, (tokens, starts, [len(each) for each in tokens]), expected))
    for entry in values.section("tasks"):
        for case in entry["rendered"]:
            shots, prompts, tokens, starts = prompts_of(task_of_entry(entry), entry["data"], case["index"], values)
            expected = (case["fewshot_indices"], case["prompts"], case["tokens"], case["start"], case["end"])
            got = (shots, prompts, tokens, starts, [len(each) for each in tokens])
            pairs.append((f"{entry['label']} {case['index']}", got, expected))
    for case in values.section("fewshot_draws"):
        pairs.append((case, draw_shots(case["index"], case["num_items"], case["k"]), case["indices"]))
    assert_same(pairs)


@each_file
@each_variant
def test_answers_of_core(values, variant):
    """Verdicts, losses of options, predicted tokens and accuracies."""
    model, same, losses, accuracies = language_model(values, variant), [], {}, {}
    for entry in values.section("tasks"):
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
@each_variant
def test_cropped_prompts(values, variant):
    """Where nanochat fails, ours still has a verdict, and any will do."""
    entries, model = {entry["label"]: entry for entry in values.section("tasks")}, language_model(values, variant)
    for case in values.section("cropping"):
        entry = entries[case["label"]]
        task, items = task_of_entry(entry), entry["data"]
        for result in case["results"]:
            index = result["index"]
            *_, tokens, starts = prompts_of(task, items, index, values)
            tokens, starts, _ = crop(tokens, starts, case["max_seq_len"])
            gold = None if task.kind == "language_modeling" else items[index]["gold"]
            question = Question(index=index, sequences=tokens, starts=starts, gold=gold)
            assert "error" in result or tokens == result["tokens"]
            if gold is None:
                ((predicted,),) = model.score(question.rows(), ("likeliest",))
                got = predicted.tolist() == tokens[0][starts[0] :]
            else:
                got = likeliest(mean_losses([found[0] for found in model.score(question.rows())])) == gold
            assert got == result.get(f"{variant}_correct", got), (task.label, index)


@each_file
@each_variant
def test_core_metric(values, variant, tmp_path):
    bundle, errors = write_bundle(tmp_path / "eval_bundle", values.section("tasks")), {}
    for number, case in enumerate(values.section("suite")[variant]):
        ctx = make_context(tmp_path / str(number))
        found, _ = evaluate_core(
            ctx, language_model(values, variant), CoreConfig(bundle=str(bundle)), max_per_task=case["max_per_task"],
            work=ctx.work / "core", progress=ctx.progress,
        )  # fmt: skip
        for label, score in found["tasks"].items():
            errors[f"{number} {label}"] = abs(score["accuracy"] - case["results"][label])
            errors[f"{number} {label} centred"] = abs(score["centered"] - case["centered_results"][label])
        errors[f"{number} CORE"] = abs(found["core"] - case["core_metric"])
    assert_within(ACCURACY, errors)


@each_file
def test_order_of_a_suite(values, tmp_path):
    meta = {"task_type": "language_modeling", "num_fewshot": 0, "continuation_delimiter": " "}
    for key, order in values.section("suite_shuffle").items():
        if key.startswith("order_"):
            data = [{"context": str(place), "continuation": "x"} for place in range(len(order))]
            entry = {"label": "numbers", "task_meta": meta, "random_baseline_percent": 0, "data": data}
            bundle = Bundle(write_bundle(tmp_path / key, [entry]))
            assert [int(item["context"]) for item in bundle.examples(bundle.tasks[0])] == order


# Bits per byte


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
    for number, case in enumerate(values.section("cases")):
        rows, table = rows_of(values, case["batches"][: case["steps"]]), token_bytes(values, case["token_bytes"])
        assert sum(int(table[targets[targets >= 0]].sum()) for _, targets in rows) == case["total_bytes"]
        got = text_loss(model, rows, table, micro_tokens=1000).bits_per_byte
        expected = case[variant]["bpb"] if variant in case else None
        expected = math.inf if case["infinite"] or expected is None else expected
        errors[str(number)] = 0.0 if got == expected else distance(got, expected)
    assert_within(BITS, errors)


@each_losses
@each_variant
def test_mean_loss_and_loss_of_each_token(values, variant):
    model, errors = values.core_model(variant), {}
    for name, expected in values.section("mean_loss")[variant].items():
        errors[name] = distance(mean_loss(model, rows_of(values, [name]), micro_tokens=1000), expected)
    for key, found in values.json.items():
        if key.startswith("loss_per_token_"):
            batch, _, row = key.removeprefix("loss_per_token_").rpartition("_row")
            ids, targets = rows_of(values, [batch])[int(row)]
            errors[key] = distance(losses_of(model, ids[None], targets), found[variant])
    assert_within(LOSS, errors)


# Chat


class Conversations:
    """Conversations of a file as a task; the last message of each holds the right letter."""

    kind, chance = "categorical", 0.25

    def __init__(self, conversations: list[dict[str, Any]]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.conversations[index]

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return bool(response == conversation["messages"][-1]["content"])


@each_file
@each_variant
def test_logits_of_letters_and_answers(values, variant, tmp_path):
    tasks, model = values.companion("tasks", ".json").json, language_model(values, variant)
    for group in values.section("chat_categorical")[variant]:
        task: Any = Conversations(tasks[group["task"]]["conversations"])
        prompts = {
            row["index"]: render_for_completion(values.tokenizer, task[row["index"]]) for row in group["results"]
        }
        assert_same((row["index"], len(prompts[row["index"]]), row["prompt_length"]) for row in group["results"])
        # Beyond the context nanochat reads the whole prompt, and ours keeps its end.
        results = [row for row in group["results"] if row["prompt_length"] <= model.context_tokens]
        logits = model.letter_logits([prompts[row["index"]] for row in results], [row["letters"] for row in results])
        for row, found in zip(results, logits, strict=True):
            assert distance(found, row["letter_logits"]) <= LOGITS
        ctx = make_context(tmp_path / group["task"])
        how = Answering(batch_rows=8, max_new_tokens=1)
        score, examples = evaluate_task(ctx, model, task, how, name=group["task"], work=ctx.work)
        answers = {example["index"]: (example["output"], example["verdict"]) for example in examples}
        assert_same((row["index"], answers[row["index"]], (row["predicted"], bool(row["correct"]))) for row in results)
        if len(results) == len(group["results"]) == len(task):
            assert absolute(score.accuracy, group["accuracy"]) <= 1e-9


@each_file
@each_variant
def test_chatcore(values, variant):
    names = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "MMLU": "mmlu", "GSM8K": "gsm8k",
             "HumanEval": "humaneval", "SpellingBee": "spelling_bee"}  # fmt: skip
    for case in values.section("chatcore")[variant]:
        scores = {
            names[name]: Score(kind="", accuracy=value, chance=case["baselines"][name], num_examples=1)
            for name, value in case["results"].items()
        }
        found = chatcore(scores, {name: name for name in scores})
        assert found["set"] == variant
        assert set(scores) == set(CHATCORE_SETS[variant])
        assert absolute(found["value"], case["chatcore"]) <= 1e-9


@of_files("tasks_*.json")
def test_verdicts_on_programs(values):
    """A program that exits before its tests passes in nanochat, not in ours. Disabled functions are left out: nanochat
    sets them to None, ours forbids what they do."""
    data, pairs = values.section("humaneval"), []
    for case in data["evaluate"]:
        program = case["completion"]
        if any(word in program for word in ("os.system", "subprocess", "os.kill", "shutil.rmtree")):
            continue
        leaves = any(word in program for word in ("sys.exit(0)", "raise SystemExit", "os._exit(0)"))
        outcome = run_program(assemble_program(data["conversations"][case["index"]], program))
        pairs.append((case["name"], outcome.passed, bool(case["success"] and not leaves)))
    for case in data["execute_code"]:
        outcome = run_program(case["code"])
        got = outcome.passed, outcome.output[: len(case["stdout"])], (case["error"] or "") in outcome.output
        pairs.append((case["code"], got, (case["success"], case["stdout"], True)))
    assert_same(pairs)
