"""RL: the questions, the weights of sampled tokens, pass@k, and resuming."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import make_optimizer, rl_config, rollout_of
from mlxchat.config.schema import RewardConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Completion, Engine
from mlxchat.errors import StepFailed
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import packed_copy
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.optim.optimizer import Rates
from mlxchat.rl.loss import policy_loss
from mlxchat.rl.rollouts import PolicyScores, Reward, Rollouts, pass_at_k
from mlxchat.training.step import TrainStep

PAD = 275
Log = list[dict[str, Any]]


def completion(ids: list[int], mask: list[int] | None = None) -> Completion:
    return Completion(ids=ids, mask=mask or [1] * len(ids), finished=True)


# Two prompts with two completions each; in the third a tool's output, 30 and 31, was forced.
PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [4, 5]]
COMPLETIONS = [
    completion([10, 11, PAD]),
    completion([12, PAD]),
    completion([20, 30, 31, 21, PAD], [1, 0, 0, 1, 1]),
    completion([22]),
]
ADVANTAGES = np.array([0.5, -0.5, -0.25, 0.25])
SAMPLED_TOKENS = 3 + 2 + 3 + 1


# Rows


def test_sampled_tokens_alone_are_targets_and_have_weights():
    rollout = rollout_of(PROMPTS, COMPLETIONS, ADVANTAGES, padding=PAD)
    made = rollout.batch(policy_loss(rollout.mask, ADVANTAGES, rl_config()).weights, padding=PAD)
    for row, (prompt, answer, advantage) in enumerate(zip(PROMPTS, COMPLETIONS, ADVANTAGES, strict=True)):
        whole = [*prompt, *answer.ids]
        assert made.ids[row, : len(whole)].tolist() == whole
        sampled = np.zeros(made.weights.shape[1])
        sampled[len(prompt) - 1 : len(whole) - 1] = answer.mask
        np.testing.assert_array_equal(made.weights[row], np.float32(sampled * advantage / SAMPLED_TOKENS))
    assert made.targets[0, :5].tolist() == [-1, -1, 10, 11, PAD]
    assert made.targets[2, :6].tolist() == [-1, 20, -1, -1, 21, PAD]
    assert ((made.targets >= 0) == (made.weights != 0)).all()


# Questions


class Numbers:
    """A task whose questions are numbers; `judge` says which answers are right."""

    def __init__(self, size: int, judge: Callable[[str], bool] = lambda answer: answer == "a") -> None:
        self.size, self.judge = size, judge

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": str(index)}, {"role": "assistant", "content": "a" * index}]}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return self.judge(response)

    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return float(self.judge(response))


class ScriptedEngine:
    """An engine whose k-th completion of a question is right if `right(question, k)`."""

    def __init__(self, tokenizer: Tokenizer, right: Callable[[int, int], bool]) -> None:
        self.tokenizer, self.right = tokenizer, right
        self.asked: list[list[int]] = []
        self.seeds: list[int] = []

    def complete(self, prompts: list[list[int]], *, seed: int, **settings: Any) -> list[Completion]:
        questions = [int("".join(c for c in self.tokenizer.decode(prompt[1:]) if c.isdigit())) for prompt in prompts]
        self.asked.append(questions)
        self.seeds.append(seed)
        counts: dict[int, int] = {}
        found = []
        for question in questions:
            counts[question] = counts.get(question, -1) + 1
            text = "a" if self.right(question, counts[question]) else "b"
            found.append(completion([*self.tokenizer.encode(text), self.tokenizer.assistant_end]))
        return found


def zeros(ids: np.ndarray, targets: np.ndarray, weights: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Stand in for the scores of a scripted engine's model."""
    return np.zeros(ids.shape), np.zeros(ids.shape)


def scripted(engine: Any, size: int, log: Log | None = None, **changes: Any) -> Rollouts:
    scores: Any = zeros
    task: Any = Numbers(size)
    return Rollouts(engine, task, rl_config(**changes), seed=3, log=[].append if log is None else log.append,
                    scores=scores)  # fmt: skip


def test_one_pass_asks_each_question_once_in_shuffled_groups(tokenizer):
    """Rewards are logged and weight the batch. The token that ends a completion is not judged."""
    log: Log = []
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0)
    source = scripted(engine, 10, log)
    made = [source.next_batch(iteration) for iteration in range(5)]
    asked = [question for rows in engine.asked for question in rows[::4]]
    assert sorted(asked) == list(range(10))
    assert asked != sorted(asked)
    assert all(rows == [question for question in rows[::4] for _ in range(4)] for rows in engine.asked)
    assert len(set(engine.seeds)) == 5
    assert log[2] == {"iteration": 3, "reward": 0.25, "completion_tokens": 2.0, "finished": 1.0, "teaching_frac": 1.0}
    assert source.mean_reward == 0.25
    # Two questions, one right completion of four each, two tokens per completion: 16 sampled tokens.
    weights = made[2].weights
    assert sorted(weights[weights != 0].tolist()) == pytest.approx([-0.25 / 16] * 12 + [0.75 / 16] * 4)


# Dynamic sampling


def iterate(engine: Any, source: Rollouts, iteration: int) -> tuple[list[int], list[int]]:
    """Return the questions that an iteration trains on, and all that it asked, in order."""
    rounds = len(engine.asked)
    source.next_batch(iteration)
    trained = [int(name.removeprefix("question ")) for name in source.documents()]
    return trained, [question for rows in engine.asked[rounds:] for question in rows[::4]]


def test_questions_without_signal_are_replaced_by_the_next_ones(tokenizer):
    """Only questions that three divides have right and wrong completions."""
    log: Log = []
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0 if question % 3 == 0 else question % 2 == 0)
    source = scripted(engine, 30, log, resample_rounds=50)
    trained, asked = iterate(engine, source, 0)
    assert sorted(trained) == sorted([question for question in asked if question % 3 == 0][:2])
    assert asked[-1] in trained, "nothing is asked once the iteration is full"
    assert [place for place, question in enumerate(asked[:2]) if question % 3 == 0] == [
        place for place, question in enumerate(trained) if question == asked[place]
    ]
    # The logged reward is that of all completions, not of the chosen questions.
    shares = [0.25 if question % 3 == 0 else float(question % 2 == 0) for question in asked]
    assert log[0]["reward"] == pytest.approx(np.mean(shares))
    assert (log[0]["teaching_frac"], log[0]["filled_frac"]) == (pytest.approx(2 / len(asked)), 1.0)


def test_iterations_and_resumes_continue_after_the_last_question(tokenizer):
    def start(**changes: Any) -> tuple[ScriptedEngine, Rollouts]:
        engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0 and question % 3 == 0)
        return engine, scripted(engine, 30, **changes)

    plain, straight, resumed = start(), start(resample_rounds=50), start(resample_rounds=50)
    order = [question for iteration in range(15) for question in iterate(*plain, iteration)[1]]
    asked = []
    for iteration in range(4):
        resumed[1].restore(json.loads(json.dumps(straight[1].state())))
        found = iterate(*straight, iteration)
        assert iterate(*resumed, iteration) == found
        asked += found[1]
    assert asked == order[: len(asked)]


# pass@k

OUTCOMES = np.array([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=bool)


def test_pass_at_k_is_the_share_solved_by_one_of_the_first_k(tokenizer):
    engine: Any = ScriptedEngine(tokenizer, lambda question, sample: bool(OUTCOMES[question][sample]))
    task: Any = Numbers(5)
    got = pass_at_k(engine, task, rl_config(), seed=0)
    means = {name: value for name, value in got.items() if not name.endswith("_stderr")}
    assert means == {"pass_at_1": 0.2, "pass_at_2": 0.4, "pass_at_3": 0.6, "pass_at_4": 0.8, "held_out_reward": 0.3}
    for k in (1, 2, 3, 4):  # standard errors over questions
        assert got[f"pass_at_{k}_stderr"] == pytest.approx(np.sqrt(k / 5 * (1 - k / 5) / 5))
    assert got["held_out_reward_stderr"] == pytest.approx(np.std([0.5, 0.25, 0.0, 0.5, 0.25]) / np.sqrt(5))


# Several updates, KL, entropy: real model, engine and scores

SEVERAL = {"minibatches_per_rollout": 2, "passes_per_rollout": 2, "clip_low": 0.2, "clip_high": 0.2}


def scores_of(model: GPT) -> PolicyScores:
    return PolicyScores(model, micro_tokens=4096, dtype=mx.float32)


def real(tokenizer: Tokenizer, log: Log, model: GPT | None = None, **changes: Any) -> Rollouts:
    task: Any = Numbers(6, lambda answer: len(answer) % 2 == 0)
    model, config = model or make_model(), rl_config(**changes)
    engine, scores = Engine(model, tokenizer, bits=config.rollout_bits), scores_of(model)
    reference = flatten_parameters(model) if config.kl_coefficient else None
    return Rollouts(engine, task, config, seed=3, log=log.append, scores=scores, reference=reference)


@pytest.mark.parametrize("bits", [None, 8])
def test_resume_within_a_rollout_is_bit_exact(tokenizer, bits):
    """The state is JSON. The ratio leaves 1 and KL leaves 0 once the model has moved."""
    log: Log = []
    straight, resumed = (
        real(tokenizer, each, make_model(width=128, scale=0.1), kl_coefficient=0.1, rollout_bits=bits, **SEVERAL)
        for each in (log, [])
    )
    model = straight.engine.model
    step = TrainStep(model, make_optimizer(model), micro_tokens=4096, dtype=mx.float32)
    for iteration in range(3):
        step(straight.next_batch(iteration), Rates(0.5, 0.9, 1.0))
    set_parameters(resumed.engine.model, flatten_parameters(model))
    resumed.restore(json.loads(json.dumps(straight.state())))
    for iteration in (3, 4):
        got, expected = resumed.next_batch(iteration), straight.next_batch(iteration)
        for name in ("ids", "targets", "weights"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    updates = [record for record in log if "ratio" in record]
    assert [record["iteration"] for record in updates] == [1, 2, 3, 4, 5]
    assert (updates[0]["ratio"], updates[0]["kl"]) == (1.0, 0.0)
    assert updates[2]["ratio"] != 1.0
    assert updates[2]["kl"] > 0


# Quantised rollouts


def test_weights_of_quantised_rollouts_are_advantages_times_importance(tokenizer):
    log: Log = []
    model = make_model(width=128, scale=0.1)  # whole groups of weights, so that they are rounded
    source = real(tokenizer, log, model, max_new_tokens=12, top_k=None, rollout_bits=4)
    made, rollout = source.next_batch(0), source._rollout
    assert rollout.rollout_log_probs is not None
    own, _ = scores_of(model)(rollout.ids[:, :-1], rollout.targets)
    sampled = rollout.mask > 0
    log_ratio = (own - rollout.rollout_log_probs)[sampled]
    advantages = np.broadcast_to(rollout.advantages[:, None], sampled.shape)[sampled]
    expected = advantages * np.minimum(2.0, np.exp(log_ratio)) / sampled.sum()
    np.testing.assert_allclose(made.weights[made.weights != 0], expected[advantages != 0], rtol=1e-4)
    assert log[0]["rollout_kl"] == pytest.approx(-log_ratio.mean(), abs=1e-4)
    assert "rollout_capped" in log[0]


# Log-probabilities


def test_scores_are_those_of_the_whole_distribution(path):
    """Against NumPy's log-softmax of the model's logits, 1e-4."""
    model, draw = make_model(), np.random.default_rng(0)
    ids = draw.integers(0, 200, (5, 32)).astype(np.int32)
    targets = np.where(draw.random(ids.shape) < 0.7, ids[:, ::-1], -1).astype(np.int32)
    logits = np.asarray(model.logits(model.hidden(mx.array(ids)))).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    for micro_tokens in (64, 4096):
        got, entropies = PolicyScores(model, micro_tokens=micro_tokens, dtype=mx.float32)(ids, targets)
        np.testing.assert_allclose(got, np.where(targets >= 0, chosen, 0), atol=1e-4)
        np.testing.assert_allclose(entropies, np.where(targets >= 0, -(np.exp(logp) * logp).sum(-1), 0), atol=1e-4)


def test_engine_reports_the_quantised_models_log_probabilities(path, tokenizer):
    """Float32, 2e-4."""
    model = make_model(width=128, scale=0.1)
    prompts = [[row, row + 1] for row in range(6)]
    completions = Engine(model, tokenizer, bits=4).complete(
        prompts, max_new_tokens=20, temperature=1.0, seed=1, log_probabilities=True
    )
    rollout = rollout_of(prompts, completions, np.zeros(6), padding=tokenizer.assistant_end)
    rounded, own = (scores_of(each)(rollout.ids[:, :-1], rollout.targets)[0] for each in (packed_copy(model, 4), model))
    assert np.abs(rollout.rollout_log_probs - rounded).max() < 2e-4
    assert np.abs(rollout.rollout_log_probs - own).max() > 0.05


# Rewards: their parts, and users' functions that raise or return no number

RIGHT = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}


class Sums:
    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return float(response.endswith("4"))


SUMS: Any = Sums()


def judge(text: str, num_tokens: int = 3, **parts: RewardConfig) -> tuple[float, dict[str, float]]:
    reward = Reward(SUMS, parts)
    return reward(RIGHT, text, num_tokens)


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a user's module."""
    file = tmp_path / "judging_of_tests.py"
    file.write_text(
        "LIMIT = 3\n"
        "def brief(conversation, answer): return len(answer) <= LIMIT\n"
        "def lost(conversation, answer): return float('nan')\n"
        "def broken(conversation, answer): raise KeyError('no such thing')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return file


def test_reward_is_the_tasks_or_the_weighted_sum_of_parts(functions):
    """Functions are imported from the current folder."""
    assert [judge("it is 4"), judge("it is 5")] == [(1.0, {}), (0.0, {})]
    parts = {
        "right": RewardConfig(kind="exact", weight=2.0),
        "form": RewardConfig(kind="format", pattern="^it.is", weight=0.5),
        "short": RewardConfig(kind="length", free_tokens=10, most_tokens=20, weight=1.0),
    }
    assert judge("it\nis 4", 15, **parts) == (2.0 + 0.5 - 0.5, {"right": 1.0, "form": 1.0, "short": -0.5})
    assert judge("so it is 4", 15, form=parts["form"]) == (0.0, {"form": 0.0})
    own = RewardConfig(kind="function", function="judging_of_tests:brief", weight=3.0)
    assert [judge("abc", own=own)[0], judge("abcd", own=own)[0]] == [3.0, 0.0]


FAILURES = {"lost": "returned nan, expected a finite number", "broken": "raised KeyError: 'no such thing'"}


@pytest.mark.parametrize("name", FAILURES)
def test_failing_function_stops_the_step(functions, name):
    part = RewardConfig(kind="function", function=f"judging_of_tests:{name}")
    with pytest.raises(StepFailed, match=f"rl.rewards.own: judging_of_tests:{name} {FAILURES[name]}.*'abc'"):
        judge("abc", own=part)
