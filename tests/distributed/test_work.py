"""Generation, scoring, evaluation and RL on several ranks equal one process."""

import json
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from distributed import ranks
from kit import models
from kit.models import make_tokenizer
from kit.training import make_context, rl_config
from mlxchat.cpu import runtime
from mlxchat.distributed import team as team_module
from mlxchat.distributed.team import Group, Team
from mlxchat.engine.generate import Engine
from mlxchat.evals.bpb import mean_loss
from mlxchat.evals.measure import Answering, evaluate_task
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.rl.rollouts import PolicyScores, Rollouts

make_model = partial(models.make_model, context_tokens=96, scale=0.25)
LENGTHS = [4, 9, 2, 17, 6, 11, 3]
TOLERANCE = 2e-5  # nats, float32: rows are padded to other widths


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

    def explain(self, conversation: dict[str, Any], response: str) -> tuple[bool, dict[str, Any]]:
        return self.evaluate(conversation, response), {}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        if self.kind == "categorical":
            return response == conversation["messages"][-1]["content"]
        return len(response) % 2 == 0

    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return len(response) % 5 / 4


def reinforce(team: Team | None, model: GPT) -> list[Any]:
    """Return log and batches of three updates with quantised rollouts, changing weights and a reference."""
    tokenizer, log, batches = make_tokenizer(), list[dict[str, Any]](), []
    config = rl_config(
        questions_per_iteration=3, samples_per_question=3, clip_low=0.2, clip_high=0.2, kl_coefficient=0.1,
        passes_per_rollout=2, rollout_bits=8,
    )  # fmt: skip
    reference = flatten_parameters(model)
    source = Rollouts(
        Engine(model, tokenizer, bits=8, team=team), Questions(5), config, seed=3, log=log.append,
        scores=PolicyScores(model, micro_tokens=200, dtype=mx.float32, team=team), reference=reference,
    )  # fmt: skip
    for iteration in range(3):
        batch = source.next_batch(iteration)
        batches.append([batch.ids.tolist(), batch.weights.tolist()])
        set_parameters(model, {name: 1.01 * value for name, value in flatten_parameters(model).items()})
    set_parameters(model, reference)
    return [log, batches]


def work(team: Team | None, architecture: str, folder: str) -> dict[str, Any]:
    """Return all results besides training; without a team, those of one process."""
    model, tokenizer = make_model(architecture), make_tokenizer()
    engine = Engine(model, tokenizer, team=team)
    prompts = [[tokenizer.bos, *range(1, 1 + length)] for length in LENGTHS]
    drawn = {"max_new_tokens": 24, "temperature": 1.0, "top_k": 50, "seed": 5, "log_probabilities": True}
    answers = {
        "greedy": engine.complete(prompts, max_new_tokens=9),
        "drawn": engine.complete(prompts, **drawn),
        "one": engine.complete(prompts[:1], **drawn),
        "none": engine.complete([], **drawn),
    }
    found: dict[str, Any] = {"answers": {name: [asdict(row) for row in rows] for name, rows in answers.items()}}
    rng, lengths = np.random.default_rng(1), [3, 90, 17, 290, 128, 1, 64, 33]
    ids = rng.integers(0, 280, (8, 300)).astype(np.int32)
    targets = np.where(np.arange(300) < np.array(lengths)[:, None], np.roll(ids, -1, axis=1), -1).astype(np.int32)
    found["losses"] = mean_loss(model, list(zip(ids, targets, strict=True)), micro_tokens=900, team=team)
    scores = PolicyScores(model, micro_tokens=900, dtype=mx.float32, team=team)
    found["scores"] = [part.tolist() for part in scores(ids, targets)]
    engine.batch_tokens = 300
    for kind in ("generative", "categorical"):
        ctx = make_context(Path(folder) / f"{architecture}-{team.size if team else 1}-{kind}")
        answering = Answering(batch_rows=3, max_new_tokens=8, seeds=2, temperature=0.8, seed=4)
        score, _ = evaluate_task(ctx, engine, Questions(10, kind), answering, name=kind, work=ctx.work)
        found[kind] = score.to_dict()
    found["rl"] = reinforce(team, model)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process finds, and what two ranks find."""
    folder = str(tmp_path_factory.mktemp("work"))
    mx.set_default_device(mx.cpu)
    runtime.set_blas_threads(1)
    return json.loads(json.dumps(work(None, "jul2026", folder))), ranks.lead_ranks(work, 2, "jul2026", folder)


def test_generation_and_scores_equal_one_process(results):
    """Also with fewer rows than ranks, and none."""
    expected, got = results
    for name, rows in expected["answers"].items():
        for right, row in zip(rows, got["answers"][name], strict=True):
            assert row["ids"] == right["ids"], name
            assert row["log_probabilities"] == pytest.approx(right["log_probabilities"], abs=1e-5, rel=1e-5)
    for name in ("losses", "scores"):
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    assert (got["generative"], got["categorical"]) == (expected["generative"], expected["categorical"])


def test_rl_batches_equal_one_process(results):
    (expected_log, expected), (log, got) = (each["rl"] for each in results)
    assert [sorted(record) for record in log] == [sorted(record) for record in expected_log]
    for (ids, weights), (expected_ids, expected_weights) in zip(got, expected, strict=True):
        assert ids == expected_ids
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-3, atol=1e-6)


# Collectives give the same bits on every rank, for any array

NOT_A_NUMBER = [0x80000000, 0x7FC00001, 0xFFC00000, 0x7F800000, 0x00000001]  # bits of −0.0, NaNs, ∞, a denormal
INTEGERS = [2**53 + 1, -(2**62)]


def use_group(group: Group) -> dict[str, Any]:
    """Run all collectives on each of three ranks."""
    rank, found = group.rank, {}
    bits = mx.array(NOT_A_NUMBER if rank == 2 else [1] * len(NOT_A_NUMBER), dtype=mx.uint32)
    found["floats"] = np.array(group.share(bits.view(mx.float32), 2).view(mx.uint32)).tolist()
    found["integers"] = np.array(group.share(mx.array(INTEGERS if rank == 2 else [0, 0], dtype=mx.int64), 2)).tolist()
    found["empty"] = list(group.share(mx.zeros((2, 0, 3))).shape)
    found["gathered JSON"] = group.gather_json({"rank": rank, "text": "ü" * 40 * rank})
    found["shared JSON"] = group.share_json({"from": rank, "text": "x" * 10_000})
    ours = {
        "a": mx.full((3, 2), rank + 1.0), "b": mx.array([rank], dtype=mx.int32), "none": mx.zeros((0, 4)),
        "d": mx.full((5,), 10.0 * rank),
    }  # fmt: skip
    for size in (1, 64 * 2**20):
        team_module.BUCKET_BYTES = size
        found[f"sums {size}"] = {name: np.array(value).tolist() for name, value in group.sum(ours).items()}
    noise = mx.array(np.random.default_rng(rank).normal(size=1001).astype(np.float32))
    found["noise"] = np.array(group.sum({"x": noise})["x"].view(mx.uint32)).tolist()
    found["gathered"] = np.array(group.gather(mx.array([[rank, rank + 10]]))).tolist()
    found["parts"] = [list(range(count)[group.part(count)]) for count in range(6)]
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return list(ranks.run_ranks(use_group, 3))


def test_broadcasts_are_bit_exact_and_gathers_in_the_order_of_ranks(found):
    for each in found:
        assert (each["floats"], each["integers"], each["empty"]) == (NOT_A_NUMBER, INTEGERS, [2, 0, 3])
        assert each["shared JSON"] == {"from": 0, "text": "x" * 10_000}
        assert each["gathered JSON"] == [{"rank": rank, "text": "ü" * 40 * rank} for rank in range(3)]
        assert each["gathered"] == [[0, 10], [1, 11], [2, 12]]


def test_sums_have_equal_bits_on_all_ranks(found):
    for each, bucket in product(found, (64 * 2**20, 1)):
        assert each[f"sums {bucket}"] == {"a": [[6.0, 6.0]] * 3, "b": [3], "none": [], "d": [30.0] * 5}
    assert found[0]["noise"] == found[1]["noise"] == found[2]["noise"]
    expected = sum(np.random.default_rng(rank).normal(size=1001).astype(np.float32) for rank in range(3))
    np.testing.assert_allclose(np.array(found[0]["noise"], np.uint32).view(np.float32), expected, atol=1e-6)
