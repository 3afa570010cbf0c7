"""Preferences: DPO and ORPO as published, pairs as rows and batches, pairs of sampled answers."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kit.artifacts import publish_base
from kit.commands import run_here
from kit.models import composed, make_model, make_tokenizer
from kit.training import make_context, make_optimizer
from mlxchat.config.schema import PreferenceConfig
from mlxchat.data.tokenizer import parse_answer, render_conversation
from mlxchat.data.tokens import Tokens
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import Interrupted
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.rl.loss import Floats, pair_loss
from mlxchat.rl.pairs import PairBatches, PairRows, sample_pairs, sum_pairs, validate
from mlxchat.rl.rollouts import PolicyScores
from mlxchat.store.fingerprint import hash_file
from mlxchat.store.store import Store
from mlxchat.tasks.base import Conversation, Task, dialogue
from mlxchat.tasks.jsonl import both_answers
from mlxchat.training.step import TrainStep

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 9, (5, 2)).astype(float)
SUMS = -LENGTHS * RNG.uniform(0.05, 4.0, (5, 2))
REFERENCE = SUMS + RNG.normal(0, 2.0, (5, 2))
LOSSES: list[dict[str, Any]] = [
    {"loss": "dpo", "beta": 0.1}, {"loss": "dpo", "beta": 0.7, "label_smoothing": 0.2},
    {"loss": "orpo", "odds_weight": 0.1}, {"loss": "orpo", "odds_weight": 1.5}, {"loss": "orpo", "odds_weight": 0.0},
]  # fmt: skip


def make_config(**changes: Any) -> PreferenceConfig:
    return PreferenceConfig(**vars(composed("experiment=smoke").preference) | changes)


def published(sums: Floats, config: PreferenceConfig) -> list[float]:
    """Return each pair's loss as the papers write it: arXiv 2305.18290 eq. 7 (with smoothing), 2403.07691 eq. 6."""
    found = []
    for (chosen, rejected), (chosen_ref, rejected_ref), lengths in zip(sums, REFERENCE, LENGTHS, strict=True):
        if config.loss == "dpo":
            right = 1 / (1 + math.exp(-config.beta * ((chosen - chosen_ref) - (rejected - rejected_ref))))
            found.append(-(1 - config.label_smoothing) * math.log(right) - config.label_smoothing * math.log(1 - right))
        else:
            p, q = math.exp(chosen / lengths[0]), math.exp(rejected / lengths[1])
            ratio = (p / (1 - p)) / (q / (1 - q))
            found.append(-math.log(p) - config.odds_weight * math.log(1 / (1 + math.exp(-math.log(ratio)))))
    return found


@pytest.mark.parametrize("changes", LOSSES)
def test_values_and_weights_are_those_of_the_published_loss(changes):
    config, step = make_config(**changes), 1e-5
    found = pair_loss(SUMS, LENGTHS, REFERENCE, config)
    assert found.values == pytest.approx(published(SUMS, config), rel=1e-12)
    for place in np.ndindex(SUMS.shape):
        up, down = SUMS.copy(), SUMS.copy()
        up[place] += step
        down[place] -= step
        slope = (np.mean(published(up, config)) - np.mean(published(down, config))) / (2 * step)
        assert found.weights[place] == pytest.approx(-slope, rel=1e-6, abs=1e-10)


ASKED = {"role": "user", "content": "who sat"}


def pair(chosen: Any, rejected: Any, *before: dict[str, Any]) -> Conversation:
    return {"messages": [*(before or [ASKED]), {"role": "assistant", "content": chosen}], "rejected": rejected}


PAIRS = [pair("the cat", "on the mat and the log"), pair("sat", "the dog"), pair("mat", "sat on"), pair("a", "bb")]


def make_rows(pairs: list[Conversation], row_tokens: int = 64) -> PairRows:
    tokenizer = make_tokenizer()
    rendered = [render_conversation(tokenizer, answer, None) for answer in both_answers(pairs)]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rendered)])
    ids, trained = (np.concatenate([each[which] for each in rendered]) for which in (0, 1))
    tokens = Tokens(offsets, ids.astype(np.uint16), trained.astype(bool))
    return PairRows(
        tokens, answer_start=tokenizer.special_ids["<|assistant_start|>"],
        padding=tokenizer.assistant_end, row_tokens=row_tokens,
    )  # fmt: skip


def make_scores(model: GPT) -> PolicyScores:
    return PolicyScores(model, micro_tokens=128, dtype=mx.float32)


def make_batches(rows: PairRows, model: GPT, reference: Any, **changes: Any) -> PairBatches:
    config = make_config(**{"pairs_per_iteration": 2} | changes)
    return PairBatches(rows, make_scores(model), reference, config, seed=3, log=lambda record: None)


def test_only_the_last_answers_own_tokens_are_targets():
    tokenizer = make_tokenizer()
    earlier = {"role": "assistant", "content": "the dog"}
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    _, targets = make_rows([pair("the log", parts, ASKED, earlier, ASKED)]).rows([0])
    chosen, rejected = (tokenizer.decode(row[row >= 0].tolist()) for row in targets)
    assert chosen == "the log<|assistant_end|>"
    assert rejected == "<|python_start|>1+1<|python_end|>2<|assistant_end|>"


@pytest.mark.parametrize(("loss", "micro_tokens"), [("dpo", 32), ("orpo", 32), ("dpo", 1024)])
def test_gradient_of_a_batch_is_that_of_the_loss(loss, micro_tokens):
    """Against MLX's gradient of the formula with the logits of whole rows; micro-batches of one row or of all."""
    model, start, rows = make_model(), make_model(seed=8), make_rows(PAIRS)
    reference = np.stack([make_scores(start)(*rows.rows([each]))[0].sum(axis=1) for each in range(len(PAIRS))])
    batches = make_batches(rows, model, reference, loss=loss, beta=0.3, odds_weight=0.4)
    batch = batches.next_batch(0)
    ids, targets = mx.array(batch.ids), mx.array(batch.targets)
    of_batch = mx.array(reference[[int(name.split()[1]) for name in batches.documents()]])

    def formula(parameters: dict[str, mx.array]) -> mx.array:
        set_parameters(model, parameters)
        losses = nn.losses.cross_entropy(model(ids), mx.maximum(targets, 0), reduction="none")
        counted = (targets >= 0).astype(mx.float32)
        sums = -(losses * counted).sum(1).reshape(-1, 2)
        if loss == "dpo":
            gained = sums - of_batch
            return -nn.log_sigmoid(0.3 * (gained[:, 0] - gained[:, 1])).mean()
        means = sums / counted.sum(1).reshape(-1, 2)
        odds = means - mx.log1p(-mx.exp(means))
        return (-means[:, 0] - 0.4 * nn.log_sigmoid(odds[:, 0] - odds[:, 1])).mean()

    parameters = flatten_parameters(model)
    value, expected = mx.value_and_grad(formula)(parameters)
    set_parameters(model, parameters)
    step = TrainStep(model, make_optimizer(model), micro_tokens=micro_tokens, dtype=mx.float32)
    surrogate, gradients = step.gradients(batch)
    assert float(surrogate.item()) + batch.offset == pytest.approx(float(value.item()), abs=1e-5)
    for name, gradient in expected.items():
        # Rounding of float32, relative to the largest derivative of the matrix.
        scale = float(mx.abs(gradient).max().item())
        assert np.abs(np.asarray(gradients[name]) - np.asarray(gradient)).max() <= 2e-4 * scale + 1e-7, name


def test_each_epoch_has_every_pair_once_in_another_order():
    rows = make_rows([pair(f"the {'cat ' * i}", "dog") for i in range(1, 7)])
    batches = make_batches(rows, make_model(), None, loss="orpo")
    seen = []
    for iteration in range(6):
        batches.next_batch(iteration)
        seen += batches.documents()
    assert sorted(seen[:6]) == sorted(seen[6:]) == [f"pair {number}" for number in range(6)]
    assert seen[:6] != seen[6:]
    again = make_batches(rows, make_model(), None, loss="orpo")
    again.restore(batches.state())
    again.next_batch(4)
    assert again.documents() == seen[8:10]


def test_validation_of_the_start_model_by_dpo_is_undecided(tmp_path):
    rows, model, ctx = make_rows(PAIRS * 20), make_model(), make_context(tmp_path)
    reference, config = sum_pairs(ctx, rows, make_scores(model))[0], make_config(loss="dpo")
    start = validate(ctx, rows, make_scores(model), reference, config)
    assert (start["val_margin"], start["val_pair_accuracy"]) == (0, 0.5)
    assert start["val_loss"] == pytest.approx(np.log(2), rel=1e-12)
    other = make_model(seed=8)
    sums = sum_pairs(ctx, rows, make_scores(other))[0]
    gained = sums - reference
    found = validate(ctx, rows, make_scores(other), reference, config)
    assert found["val_pair_accuracy"] == pytest.approx((gained[:, 0] > gained[:, 1]).mean())
    assert (found["val_chosen_log_prob"], found["val_rejected_log_prob"]) == pytest.approx(tuple(sums.mean(axis=0)))


ANSWERS = ["the cat", "the dog", "the cat", "the mat", "the log", "the cat sat", "cat", "dog"]


class Cats(Task):
    name = "cats"

    def _own_size(self) -> int:
        return 40

    def _conversation(self, index: int, rng: Any) -> Conversation:
        return dialogue(f"who sat {index}", "the cat")

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        return "cat" in response


class Scripted(Engine):
    """Answers as a script says; the last of a question's answers is cut off."""

    calls = 0

    def complete(self, prompts: list[list[int]], **how: Any) -> list[Completion]:
        self.calls += 1
        end = self.tokenizer.assistant_end
        rows = [self.tokenizer.encode(ANSWERS[number % len(ANSWERS)]) for number in range(len(prompts))]
        finished = [number % len(ANSWERS) < len(ANSWERS) - 1 for number in range(len(prompts))]
        return [
            Completion(ids=[*ids, end] if whole else ids, mask=[1] * (len(ids) + whole), finished=whole)
            for ids, whole in zip(rows, finished, strict=True)
        ]


def make_engine() -> Scripted:
    return Scripted(make_model(), make_tokenizer())


def test_different_right_answers_are_paired_with_different_wrong_ones(tmp_path):
    ctx = make_context(tmp_path)
    pairs = sample_pairs(ctx, "data", Cats("train"), make_engine(), make_config(pairs_per_question=4), seed=1)
    of_one = [(pair["messages"][-1]["content"], pair["rejected"]) for pair in pairs[:3]]
    assert of_one == [("the cat", "the dog"), ("the cat sat", "the mat"), ("cat", "the log")]
    assert len(pairs) == 3 * 40
    assert pairs[3]["messages"][0]["content"] == "who sat 1"
    assert ctx.derived == {"data_questions": 40, "data_right_frac": 4 / 8}
    fewer = sample_pairs(ctx, "other", Cats("train"), make_engine(), make_config(pairs_per_question=1), seed=1)
    assert fewer == pairs[::3]


def test_interrupted_sampling_continues_and_gives_the_same_pairs(tmp_path):
    how: dict[str, Any] = {"config": make_config(samples_per_question=8), "seed": 1}
    whole = sample_pairs(make_context(tmp_path / "whole"), "data", Cats("train"), make_engine(), **how)
    stopping, again = make_engine(), make_engine()
    ctx = make_context(tmp_path, stop_signal=lambda: 15 if stopping.calls == 2 else None)
    with pytest.raises(Interrupted, match="32 of 40 data questions answered"):
        sample_pairs(ctx, "data", Cats("train"), stopping, **how)
    assert sample_pairs(make_context(tmp_path), "data", Cats("train"), again, **how) == whole
    assert (stopping.calls, again.calls) == (2, 1)


def test_parsed_answers_render_to_the_same_tokens():
    """Tokens that no content renders to give None."""
    tokenizer = make_tokenizer()
    text, python, empty = ({"type": kind, "text": text} for kind, text in
                           (("text", "it is "), ("python", "1+1"), ("python_output", "")))  # fmt: skip
    for content in ("the cat", [text, python, {**empty, "text": "2"}], [python, empty, text]):
        ids, _ = render_conversation(tokenizer, dialogue("who", content))
        begin = ids.index(tokenizer.special_ids["<|assistant_start|>"]) + 1
        assert parse_answer(tokenizer, ids[begin:-1]) == content
    for tokens in (["<|python_start|>"], ["<|user_start|>"], ["<|python_end|>"], []):
        assert parse_answer(tokenizer, [tokenizer.special_ids[token] for token in tokens]) is None


# The stage preference: from pairs to a checkpoint, resumed bit for bit, and what it gains

SETTINGS = """
    pipeline=preference stage=preference machine=cpu machine.blas_threads=1 machine.checkpoint_seconds=0
    preference.row_tokens=64 preference.pairs_per_iteration=4 preference.num_iterations=6
    preference.schedule.init_lr_frac=0.2 preference.eval_every=3
"""


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Outputs with a model, and beside them pairs: cats are preferred to dogs."""
    publish_base(tmp_path / "outputs")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for number in range(40):
            line = {"prompt": f"who sat {number}", "chosen": "the cat", "rejected": "the dog"}
            file.write(json.dumps(line) + "\n")
    return tmp_path / "outputs"


def command(outputs: Path) -> list[str]:
    (base,) = (each["name"] for each in Store(outputs).manifests() if each["step"] == "base")
    checkpoint = f"pipeline.preference.checkpoint=artifact:{base}"
    pairs = f"preference.data.path={outputs.with_name('pairs.jsonl')}"
    return [*SETTINGS.split(), "preference.adapter.kind=lora", checkpoint, pairs, f"outputs={outputs}"]


def made(outputs: Path) -> Path:
    (found,) = (each for each in Store(outputs).manifests() if each["step"] == "preference")
    return outputs / "store" / str(found["name"])


def test_killed_training_ends_with_the_same_bytes_and_prefers_the_chosen(outputs, mlxchat, tmp_path):
    settings = command(outputs)
    killed = mlxchat(*settings, cwd=tmp_path, environ={"MLXCHAT_CRASH_AT": "train.iteration:4"})
    assert killed.returncode == -9, killed.stdout + killed.stderr
    assert run_here(*settings) == 0
    resumed, straight = made(outputs), outputs.with_name("straight")
    curve = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in curve if "val_loss" in line] == [0, 3, 6]
    assert [line["iteration"] for line in curve if "loss" in line] == [1, 2, 3, 4, 5, 6]
    losses = [line["loss"] for line in curve if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3), "DPO's loss of the reference itself"
    metrics = json.loads((resumed / "manifest.json").read_text())["metrics"]
    assert metrics["val_pair_accuracy"] == 1.0 > curve[0]["val_pair_accuracy"]
    assert metrics["val_loss"] < curve[0]["val_loss"]
    publish_base(straight)
    assert run_here(*settings[:-1], f"outputs={straight}") == 0
    assert hash_file(made(straight) / "adapters.safetensors") == hash_file(resumed / "adapters.safetensors")
