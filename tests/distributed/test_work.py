"""Everything besides training equals one process: answers, losses, scores, verdicts."""

import io
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit import models, ranks
from kit.models import make_tokenizer
from kit.text import core_items, write_bundle
from kit.training import rl_config
from mlxchat.cpu import runtime
from mlxchat.data.packing import Row
from mlxchat.distributed.team import Team
from mlxchat.engine.generate import Engine
from mlxchat.errors import Interrupted
from mlxchat.evals.bpb import mean_loss, text_loss
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import evaluate_core
from mlxchat.evals.rank_model import language_model, text_model
from mlxchat.evals.samples import answer_prompts
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters, trained_parameters
from mlxchat.model.lora import attach_adapters
from mlxchat.model.sizes import AdapterSizes
from mlxchat.rl.rollouts import Rollouts, pass_at_k
from mlxchat.rl.scores import PolicyScores
from mlxchat.runner.progress import Progress

make_model = partial(models.make_model, context_tokens=96, scale=0.25)
LENGTHS = [4, 9, 2, 17, 6, 11, 3]
TOLERANCE = 2e-5  # nats, float32: rows are padded to other widths


def calling(model: GPT) -> GPT:
    """Return a model that answers prompts ending in one of LENGTHS by a calculator call of 1."""
    tokenizer, made = make_tokenizer(), GPT(model.sizes)
    weights = {name: np.array(value) for name, value in flatten_parameters(model).items()}
    weights |= {name: 0.02 * value for name, value in weights.items() if "c_proj" in name}
    words, head = weights["transformer.wte.weight"], 0.02 * weights["lm_head.weight"]
    (one,), special = tokenizer.encode("1"), tokenizer.special_ids
    begin, end = special["<|python_start|>"], special["<|python_end|>"]
    head[begin], head[one], head[end] = words[LENGTHS].sum(axis=0), words[begin], words[one]
    weights["lm_head.weight"] = head
    set_parameters(made, {name: mx.array(value) for name, value in weights.items()})
    return made


class Questions:
    chance = 0.25

    def __init__(self, count: int, kind: str = "generative") -> None:
        self.count, self.kind = count, kind

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        question = f"{index}:" + " the cat" * (index * 7 % 5)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "ABCD"[index % 4]}]
        return {"messages": messages, "letters": list("ABCD")}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        if self.kind == "categorical":
            return response == conversation["messages"][-1]["content"]
        return len(response) % 2 == 0

    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return len(response) % 5 / 4


def rows_of(lengths: list[int], width: int = 96) -> list[Row]:
    rng, rows = np.random.default_rng(1), []
    for length in lengths:
        ids, targets = rng.integers(0, 280, width).astype(np.int32), np.full(width, -1, np.int32)
        targets[:length] = rng.integers(0, 280, length)
        rows.append((ids, targets))
    return rows


settings = partial(
    rl_config, questions_per_iteration=3, samples_per_question=3, eval_samples=2, clip_low=0.2, clip_high=0.2,
    kl_coefficient=0.1, passes_per_rollout=2,
)  # fmt: skip


def completions(team: Team | None, model: GPT) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    engine = Engine(model, tokenizer, team=team)
    prompts = [[tokenizer.bos, *range(1, 1 + length)] for length in LENGTHS]
    drawn = {"max_new_tokens": 24, "temperature": 1.0, "top_k": 50, "seed": 5, "log_probabilities": True}
    rounded = Engine(model, tokenizer, bits=4, trained=True, team=team)
    found = {
        "greedy": engine.complete(prompts, max_new_tokens=9),
        "drawn": engine.complete(prompts, **drawn),
        "calls": Engine(calling(model), tokenizer, team=team).complete(prompts, **drawn),
        "seeds": engine.complete(prompts, **drawn | {"seed": list(range(7, 14))}),
        "one": engine.complete(prompts[:1], **drawn),
        "none": engine.complete([], **drawn),
        "rounded": rounded.complete(prompts, **drawn),
        "again": engine.complete(prompts[:3], max_new_tokens=9),
    }
    return {name: [asdict(row) for row in rows] for name, rows in found.items()}


def reinforce(team: Team | None, model: GPT, bits: int | None) -> list[Any]:
    """Return log and batches of three updates, with changing weights."""
    tokenizer, log, batches = make_tokenizer(), list[dict[str, Any]](), []
    config, task = settings(rollout_bits=bits), Questions(5)
    reference = flatten_parameters(model)
    source = Rollouts(
        Engine(model, tokenizer, bits=bits, trained=True, team=team), task, config, seed=3, log=log.append,
        scores=PolicyScores(model, micro_tokens=200, dtype=mx.float32, team=team), reference=reference,
    )  # fmt: skip
    for iteration in range(3):
        batch = source.next_batch(iteration)
        batches.append([batch.ids.tolist(), batch.weights.tolist()])
        set_parameters(model, {name: 1.01 * value for name, value in flatten_parameters(model).items()})
    log.append(pass_at_k(Engine(model, tokenizer, trained=True, team=team), task, config, seed=2))
    set_parameters(model, reference)
    return [log, batches]


def adapted(team: Team | None, model: GPT) -> dict[str, Any]:
    """Return answers and losses of adapters on a quantised base, and losses of a reference."""
    tokenizer, sizes = make_tokenizer(), model.sizes
    names = tuple(f"transformer.h.{layer}.{name}" for layer in range(2) for name in ("attn.c_q", "mlp.c_proj"))
    attach_adapters(model, AdapterSizes("dora", 2, 2.0, names, bits=8, group_size=32, dropout=0.1))
    rng = np.random.default_rng(3)
    moved = {
        name: mx.array(np.array(value) + rng.normal(scale=0.1, size=value.shape).astype(np.float32))
        for name, value in trained_parameters(model).items()
    }
    reference = trained_parameters(model)
    set_parameters(model, moved)
    rows = rows_of([90, 17, 5], sizes.context_tokens)
    ids, targets = (np.stack([row[side] for row in rows]) for side in (0, 1))
    scores = PolicyScores(model, micro_tokens=300, dtype=mx.float32, team=team)
    prompts = [[tokenizer.bos, 1, 2], [tokenizer.bos, 5]]
    answers = Engine(model, tokenizer, team=team).complete(prompts, max_new_tokens=6)
    return {
        "answers": [row.ids for row in answers],
        "losses": [mean_loss(text_model(team, model), rows, micro_tokens=300)],
        "scores": [scores(ids, targets)[0].tolist(), scores(ids, targets, reference)[0].tolist()],
    }


def work(team: Team | None, architecture: str, folder: str) -> dict[str, Any]:
    """Return all results besides training; without a team, those of one process."""
    model, tokenizer = make_model(architecture), make_tokenizer()
    scored = text_model(team, model)
    engine = Engine(model, tokenizer, team=team)
    found: dict[str, Any] = {"completions": completions(team, model)}
    whole, padded = rows_of([96] * 7), rows_of(sorted([3, 90, 17, 290, 128, 1, 64, 33]), 300)
    loss = text_loss(scored, whole, tokenizer.token_bytes, micro_tokens=300)
    found["counted"] = [loss.num_bytes, loss.num_tokens]
    found["text"], found["one_row"] = loss.bits_per_byte, mean_loss(scored, whole[:1], micro_tokens=300)
    found["padded"] = mean_loss(scored, padded, micro_tokens=900)
    ids, targets = (np.stack([row[side] for row in padded]) for side in (0, 1))
    scores = PolicyScores(model, micro_tokens=900, dtype=mx.float32, team=team)
    other = {name: 0.9 * value for name, value in flatten_parameters(model).items()}
    found["scores"] = [part.tolist() for part in scores(ids, targets)]
    found["reference_scores"] = [part.tolist() for part in scores(ids, targets, other)]
    core = evaluate_core(
        language_model(team, model, padding=tokenizer.bos), tokenizer, Path(folder) / "bundle", max_per_task=None,
        tasks=None, batch_tokens=300, work=Path(folder) / f"core-{architecture}-{team.size if team else 1}",
        progress=lambda total, unit: Progress("core", total, unit, stream=io.StringIO()),
    )  # fmt: skip
    found["core"], found["core_examples"] = core.to_dict(), core.examples
    for kind in ("generative", "categorical"):
        answering = Answering(batch_rows=3, max_new_tokens=8, batch_tokens=200, seeds=2, temperature=0.8, seed=4)
        score, examples = evaluate_task(engine, Questions(10, kind), answering)
        found[kind] = [score.to_dict(), examples]
    found["samples"] = answer_prompts(engine, ["the cat", "the dog sat"], 6)
    found["rl"] = {str(bits): reinforce(team, model, bits) for bits in (None, 8)}
    found["adapted"] = adapted(team, model)
    return found


@pytest.fixture(autouse=True)
def on_one_core() -> None:
    runtime.set_blas_threads(1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("work")
    kinds = {"choice": ("multiple_choice", 11), "schema": ("schema", 5), "story": ("language_modeling", 7)}
    tasks = {label: (kind, 1, 25, core_items(kind, count)) for label, (kind, count) in kinds.items()}
    write_bundle(folder / "bundle", tasks)
    return str(folder)


@pytest.fixture(scope="module")
def of_ranks(bundle: str) -> Callable[[str, int], dict[str, Any]]:
    @cache
    def run(architecture: str, size: int) -> dict[str, Any]:
        return ranks.lead_ranks(work, size, architecture, bundle)

    return run


@pytest.fixture(scope="module")
def of_one(bundle: str) -> Callable[[str], dict[str, Any]]:
    @cache
    def run(architecture: str) -> dict[str, Any]:
        mx.set_default_device(mx.cpu)
        runtime.set_blas_threads(1)
        return json.loads(json.dumps(work(None, architecture, bundle)))

    return run


EACH = pytest.mark.parametrize(
    ("architecture", "size"), [("oct2025", 2), pytest.param("jul2026", 3, marks=pytest.mark.slow)]
)


@EACH
def test_answers_equal_one_process(of_ranks, of_one, architecture, size, rows_sum_alike):
    """Including calculator results, with too few rows and with none; bit for bit where rows sum alike."""
    expected, got = deepcopy((of_one(architecture)["completions"], of_ranks(architecture, size)["completions"]))
    assert [len(rows) for rows in expected.values()] == [7, 7, 7, 7, 1, 0, 7, 3]
    assert sum(0 in row["mask"] for row in expected["calls"]) > 1, "no call of the calculator"
    if not rows_sum_alike:  # then float32 rounds log-probabilities in another order
        for name, rows in expected.items():
            for right, row in zip(rows, got[name], strict=True):
                found = row.pop("log_probabilities")
                assert found == pytest.approx(right.pop("log_probabilities"), abs=1e-5, rel=1e-5)
    assert got == expected
    assert of_ranks(architecture, size)["samples"] == of_one(architecture)["samples"]


@EACH
def test_losses_and_log_probabilities_agree(of_ranks, of_one, architecture, size):
    expected, got = of_one(architecture), of_ranks(architecture, size)
    assert np.ptp(np.array(expected["scores"])) > 0
    for name in ("text", "padded", "one_row", "scores", "reference_scores"):
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    assert got["counted"] == expected["counted"]


@EACH
def test_core_equals_one_process(of_ranks, of_one, architecture, size):
    expected, got = of_one(architecture), of_ranks(architecture, size)
    assert got["core"] == expected["core"]
    for mine, theirs in zip(got["core_examples"], expected["core_examples"], strict=True):
        losses = [each["details"].get("losses", []) for each in (mine, theirs)]
        np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE)
        assert mine | {"details": None} == theirs | {"details": None}


@EACH
def test_task_scores_equal_one_process(of_ranks, of_one, architecture, size):
    expected, got = of_one(architecture), of_ranks(architecture, size)
    assert got["generative"] == expected["generative"]
    assert 0 < got["generative"][0]["accuracy"] < 1
    assert got["categorical"][0] == expected["categorical"][0]
    for mine, theirs in zip(got["categorical"][1], expected["categorical"][1], strict=True):
        logits = [list(each["details"]["logits"].values()) for each in (mine, theirs)]
        np.testing.assert_allclose(*logits, rtol=0, atol=TOLERANCE)
        assert mine | {"details": None} == theirs | {"details": None}


@EACH
@pytest.mark.parametrize("bits", ["None", "8"])
def test_rl_batches_equal_one_process(of_ranks, of_one, architecture, size, bits):
    """Also after the weights have changed, with an unchanged reference, and with quantised rollouts."""
    (expected_log, expected), (log, got) = (
        each["rl"][bits] for each in (of_one(architecture), of_ranks(architecture, size))
    )
    assert [sorted(each) for each in log] == [sorted(each) for each in expected_log]
    for mine, theirs in zip(log, expected_log, strict=True):
        for name, value in theirs.items():
            tolerance = 0 if name.startswith(("reward", "pass_at", "held_out", "completion", "iteration")) else 1e-4
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert len({json.dumps(ids) for ids, _ in expected}) > 1, "a second iteration, with other answers"
    for (ids, weights), (expected_ids, expected_weights) in zip(got, expected, strict=True):
        assert ids == expected_ids
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-3, atol=1e-6)


@EACH
def test_adapters_equal_one_process(of_ranks, of_one, architecture, size):
    expected, got = of_one(architecture)["adapted"], of_ranks(architecture, size)["adapted"]
    assert got["answers"] == expected["answers"]
    np.testing.assert_allclose(got["losses"], expected["losses"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got["scores"], expected["scores"], rtol=0, atol=TOLERANCE)
    with_adapters, of_reference = np.array(expected["scores"])
    assert np.abs(with_adapters - of_reference).max() > 0.01


# A stop in the middle


def answer_until(team: Team | None, folder: str, stop_after: int | None, kind: str) -> list[Any]:
    """Return the numbers of known answers after each batch, score and examples; if stopped, only the numbers."""
    model, known = make_model("oct2025"), list[int]()
    answering = Answering(batch_rows=2, max_new_tokens=8, batch_tokens=100, seeds=2, temperature=0.8, seed=4)
    try:
        score, examples = evaluate_task(
            Engine(model, make_tokenizer(), team=team), Questions(13, kind), answering, work=Path(folder),
            on_progress=known.append, should_stop=lambda: stop_after is not None and len(known) > stop_after,
        )  # fmt: skip
    except Interrupted:
        return [known]
    return [known, score.to_dict(), examples]


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        ("generative", 1, 2),
        pytest.param("generative", 2, 3, marks=pytest.mark.slow),
        pytest.param("categorical", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_resumes_with_another_number_of_ranks(tmp_path, kind, first, then):
    def answer(size: int, name: str, stop_after: int | None) -> list[Any]:
        given = (str(tmp_path / name), stop_after, kind)
        found = answer_until(None, *given) if size == 1 else ranks.lead_ranks(answer_until, size, *given)
        return json.loads(json.dumps(found))

    _, score, examples = answer(1, "straight", None)
    (before,) = answer(first, "stopped", 2)
    after, *got = answer(then, "stopped", None)
    total = 26 if kind == "generative" else 13
    assert 0 < before[-1] < total
    assert after[0] == before[-1], "known answers are kept"
    assert after == sorted(after)
    assert after[-1] == total
    assert got[0] == score
    if kind == "generative":
        assert got[1] == examples
