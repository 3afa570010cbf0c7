"""RL: who is rewarded, which tokens are trained, and how much."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import make_optimizer, rl_config
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Completion, Engine
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.ops.cross_entropy import token_losses
from mlxchat.optim.schedule import Rates
from mlxchat.training.advantages import centre_rewards
from mlxchat.training.pass_at_k import pass_at_k, summarise
from mlxchat.training.policy_batch import sampled_mask, weighted_rows
from mlxchat.training.policy_loss import policy_loss
from mlxchat.training.policy_scores import PolicyScores
from mlxchat.training.rollouts import Rollouts
from mlxchat.training.step import Batch, TrainStep

PAD = 275


def completion(ids: list[int], mask: list[int] | None = None) -> Completion:
    return Completion(ids=ids, mask=mask or [1] * len(ids), finished=True)


# Two prompts with two answers each; the third answer has a tool's output, 30 and 31, that was forced.
PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [4, 5]]
ANSWERS = [
    completion([10, 11, PAD]),
    completion([12, PAD]),
    completion([20, 30, 31, 21, PAD], [1, 0, 0, 1, 1]),
    completion([22]),
]
ADVANTAGES = np.array([0.5, -0.5, -0.25, 0.25])
SAMPLED_TOKENS = 3 + 2 + 3 + 1


def weighted_batch(
    prompts: list[list[int]], completions: list[Completion], advantages: np.ndarray, *, padding: int
) -> Batch:
    weights = policy_loss(sampled_mask(completions), advantages, rl_config()).weights
    return weighted_rows(prompts, completions, weights, padding=padding)


def batch(advantages: np.ndarray = ADVANTAGES) -> Batch:
    return weighted_batch(PROMPTS, ANSWERS, advantages, padding=PAD)


# Advantages


def test_an_advantage_is_the_reward_less_the_mean_of_its_question() -> None:
    got = centre_rewards(np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(got, [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]])


# Weights


def test_exactly_the_sampled_tokens_have_a_weight() -> None:
    made = batch()
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        whole = [*prompt, *answer.ids]
        assert made.ids[row, : len(whole)].tolist() == whole
        sampled = [0] * (len(prompt) - 1) + answer.mask
        assert (made.weights[row] != 0).tolist()[: len(sampled)] == [bool(bit) for bit in sampled]
        assert not made.weights[row, len(sampled) :].any()


def test_a_weight_is_the_advantage_over_the_sampled_tokens_of_all_rows() -> None:
    made = batch()
    for row, advantage in enumerate(ADVANTAGES):
        assert set(made.weights[row][made.weights[row] != 0].tolist()) == {np.float32(advantage / SAMPLED_TOKENS)}


def test_targets_are_the_sampled_tokens_the_end_among_them_and_nothing_else() -> None:
    made = batch()
    assert made.targets[0, :5].tolist() == [-1, -1, 10, 11, PAD]
    assert made.targets[2, :6].tolist() == [-1, 20, -1, -1, 21, PAD]
    assert ((made.targets >= 0) == (made.weights != 0)).all()


def test_rows_without_advantage_are_left_out_but_count_in_the_divisor() -> None:
    made = batch(np.array([0.5, -0.5, 0.0, 0.0]))
    assert np.abs(made.weights).sum() == pytest.approx((3 * 0.5 + 2 * 0.5) / SAMPLED_TOKENS)
    assert not (made.ids == 20).any()


def test_shapes_repeat_so_that_few_are_compiled() -> None:
    shapes = {
        weighted_batch([[1]] * rows, [completion([7] * length)] * rows, np.ones(rows), padding=PAD).ids.shape
        for rows in (1, 7, 16)
        for length in (1, 20, 31)
    }
    assert shapes == {(16, 32)}


def test_no_advantage_at_all_makes_a_batch_without_targets() -> None:
    made = batch(np.zeros(4))
    assert (made.targets < 0).all()
    assert not made.weights.any()


# The loss


def as_nanochat(model: GPT, advantages: np.ndarray) -> float:
    """Return −Σ log p × advantage / sampled tokens, row by row without padding."""
    total = 0.0
    for prompt, answer, advantage in zip(PROMPTS, ANSWERS, advantages, strict=True):
        ids = mx.array([prompt + answer.ids])
        losses = token_losses(model.hidden(ids[:, :-1])[0], model.lm_head.weight, ids[0, 1:])
        sampled = np.array([0] * (len(prompt) - 1) + answer.mask)
        total += advantage * float((np.asarray(losses) * sampled).sum())
    return total / SAMPLED_TOKENS


@pytest.mark.parametrize("advantages", [ADVANTAGES, np.array([0.5, -0.5, 0.0, 0.0])], ids=["all", "some"])
@pytest.mark.parametrize("micro_tokens", [64, 10_000])
def test_the_loss_is_the_advantage_times_the_cross_entropy_of_sampled_tokens(
    advantages: np.ndarray, micro_tokens: int
) -> None:
    model = make_model()
    expected = as_nanochat(model, advantages)
    step = TrainStep(model, make_optimizer(model), micro_tokens=micro_tokens, dtype=mx.float32)
    assert step(batch(advantages), Rates(1.0, 0.9, 1.0))[0] == pytest.approx(expected, rel=1e-4)


def test_leaving_rows_out_changes_no_gradient() -> None:
    """Against the same rows left in with a weight of zero."""
    advantages = np.array([0.5, -0.5, 0.0, 0.0])
    lean, full = batch(advantages), batch()
    kept = np.concatenate([full.weights[:2], np.zeros_like(full.weights[2:])])
    padded = Batch(full.ids, full.targets, kept)
    model = make_model()
    step = TrainStep(model, make_optimizer(model), micro_tokens=10_000, dtype=mx.float32)
    (one, got), (other, expected) = (step.gradients(each) for each in (lean, padded))
    assert one.item() == pytest.approx(other.item(), rel=1e-6)
    for name in expected:
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(expected[name]), atol=1e-6)


def test_rewarded_answers_become_likelier_and_others_less() -> None:
    model = make_model()
    step = TrainStep(model, make_optimizer(model), micro_tokens=10_000, dtype=mx.float32)
    advantages = np.array([1.0, -1.0, 0.0, 0.0])
    first, second = np.eye(4)[:2]
    good, bad = as_nanochat(model, first), as_nanochat(model, second)
    for _ in range(3):
        step(batch(advantages), Rates(0.2, 0.9, 1.0))
    assert as_nanochat(model, first) < good
    assert as_nanochat(model, second) > bad


# Questions


class Numbers:
    """A task whose question is its number; an answer is right if it is the letter 'a'."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": str(index)}, {"role": "assistant", "content": "a"}]}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return response.startswith("a")

    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return float(self.evaluate(conversation, response))


class ScriptedEngine:
    """An engine whose k-th answer to a question is decided by `right(question, k)`."""

    def __init__(self, tokenizer: Tokenizer, right: Callable[[int, int], bool]) -> None:
        self.tokenizer, self.right = tokenizer, right
        self.asked: list[list[int]] = []
        self.seeds: list[int] = []

    def complete(self, prompts: list[list[int]], *, seed: int, **settings: Any) -> list[Completion]:
        questions = [int("".join(c for c in self.tokenizer.decode(prompt[1:]) if c.isdigit())) for prompt in prompts]
        self.asked.append(questions)
        self.seeds.append(seed)
        drawn: dict[int, int] = {}
        answers = []
        for question in questions:
            sample = drawn.get(question, 0)
            drawn[question] = sample + 1
            text = "a" if self.right(question, sample) else "b"
            answers.append(completion([*self.tokenizer.encode(text), self.tokenizer.assistant_end]))
        return answers


def rollouts(
    engine: Any, task: Any, log: Callable[[dict[str, Any]], None] = lambda record: None, **changes: Any
) -> Rollouts:
    return Rollouts(engine, task, rl_config(**changes), seed=3, log=log)


def test_a_pass_asks_every_question_once_in_a_shuffled_order(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0)
    source = rollouts(engine, Numbers(10))
    for iteration in range(5):
        source.next_batch(iteration)
    asked = [question for batch in engine.asked for question in batch[::4]]
    assert sorted(asked) == list(range(10))
    assert asked != sorted(asked)
    assert all(batch == [question for question in batch[::4] for _ in range(4)] for batch in engine.asked)


def test_each_iteration_draws_with_a_seed_of_its_own(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0)
    source = rollouts(engine, Numbers(4))
    for iteration in range(8):
        source.next_batch(iteration)
    assert len(set(engine.seeds)) == 8


def test_rewards_and_lengths_are_logged(tokenizer: Tokenizer) -> None:
    log: list[dict[str, Any]] = []
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample < 1)
    source = rollouts(engine, Numbers(4), log.append)
    source.next_batch(2)
    assert log == [{"iteration": 3, "reward": 0.25, "completion_tokens": 2.0, "finished": 1.0, "teaching_frac": 1.0}]
    assert source.mean_reward == 0.25


def test_the_token_that_ends_an_answer_is_not_judged(tokenizer: Tokenizer) -> None:
    """Else a task that compares whole answers, such as a letter, would never reward one."""
    task: Any = Numbers(4)
    task.evaluate = lambda conversation, response: response == "a"
    source = rollouts(ScriptedEngine(tokenizer, lambda question, sample: sample < 1), task)
    source.next_batch(0)
    assert source.mean_reward == 0.25
    numbers = pass_at_k(ScriptedEngine(tokenizer, lambda question, sample: sample < 1), task, rl_config(), seed=0)
    assert numbers["held_out_reward"] == 0.25


def test_the_batch_of_an_iteration_is_weighted_by_its_rewards(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample < 1)
    made = rollouts(engine, Numbers(4)).next_batch(0)
    # Two questions, one right answer of four each, two tokens per answer: 16 sampled tokens.
    weights = made.weights[made.weights != 0]
    assert sorted(weights.tolist()) == pytest.approx([-0.25 / 16] * 12 + [0.75 / 16] * 4)


def test_an_iterations_batch_does_not_depend_on_what_came_before(tokenizer: Tokenizer) -> None:
    """So that a resumed training samples what it would have sampled."""
    task: Any = Numbers(6)
    task.evaluate = lambda conversation, response: len(response) % 2 == 0
    straight, resumed = (rollouts(Engine(make_model(), tokenizer), task) for _ in range(2))
    straight.next_batch(0)
    expected = straight.next_batch(1)
    resumed.restore(straight.state())
    got = resumed.next_batch(1)
    for name in ("ids", "targets", "weights"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


# Questions that teach nothing


def taught(engine: Any, source: Rollouts, iteration: int) -> tuple[list[int], list[int]]:
    """Return the questions that an iteration trained on, and all that were asked for it, in order."""
    rounds = len(engine.asked)
    source.next_batch(iteration)
    trained = [int(name.removeprefix("question ")) for name in source.documents()]
    return trained, [question for batch in engine.asked[rounds:] for question in batch[::4]]


def test_the_next_questions_take_the_place_of_those_whose_answers_are_all_alike(tokenizer: Tokenizer) -> None:
    """Only questions that three divides have right and wrong answers; the others are all right or all wrong."""
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0 if question % 3 == 0 else question % 2 == 0)
    source = rollouts(engine, Numbers(30), resample_rounds=50)
    trained, asked = taught(engine, source, 0)
    teaching = [question for question in asked if question % 3 == 0]
    assert sorted(trained) == sorted(teaching[:2])
    assert asked[-1] in trained, "nothing is asked once the iteration is full"
    assert [place for place, question in enumerate(asked[:2]) if question % 3 == 0] == [
        place for place, question in enumerate(trained) if question == asked[place]
    ]


def test_iterations_go_on_behind_all_that_was_asked(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0 and question % 3 == 0)
    source = rollouts(engine, Numbers(30), resample_rounds=50)
    asked = [question for iteration in range(4) for question in taught(engine, source, iteration)[1]]
    assert len(asked) == len(set(asked)) <= 30
    plain = ScriptedEngine(tokenizer, lambda question, sample: sample == 0)
    reference = rollouts(plain, Numbers(30))
    order = [question for iteration in range(15) for question in taught(plain, reference, iteration)[1]]
    assert asked == order[: len(asked)]


def test_rounds_end_and_what_is_left_then_stays_without_weight(tokenizer: Tokenizer) -> None:
    log: list[dict[str, Any]] = []
    engine = ScriptedEngine(tokenizer, lambda question, sample: True)
    source = rollouts(engine, Numbers(30), log.append, resample_rounds=3)
    made = source.next_batch(0)
    assert [len(batch) for batch in engine.asked] == [8] * 4
    assert [f"question {question}" for question in engine.asked[0][::4]] == source.documents()
    assert not made.weights.any()
    assert (log[0]["questions_asked"], log[0]["filled_frac"], log[0]["teaching_frac"]) == (8, 0.0, 0.0)
    assert len(set(engine.seeds)) == 4


def test_the_reward_that_is_logged_is_that_of_all_answers(tokenizer: Tokenizer) -> None:
    """Not of the chosen questions, whose rewards say more about the choice than about the model."""
    log: list[dict[str, Any]] = []
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0 if question % 3 == 0 else True)
    source = rollouts(engine, Numbers(30), log.append, resample_rounds=50)
    _, asked = taught(engine, source, 0)
    assert log[0]["reward"] == pytest.approx(np.mean([0.25 if question % 3 == 0 else 1.0 for question in asked]))
    assert log[0]["teaching_frac"] == pytest.approx(2 / len(asked))
    assert log[0]["filled_frac"] == 1.0


def test_a_resumed_training_asks_what_it_would_have_asked(tokenizer: Tokenizer) -> None:
    def scripted() -> ScriptedEngine:
        return ScriptedEngine(tokenizer, lambda question, sample: sample == 0 and question % 3 == 0)

    one, other = scripted(), scripted()
    straight, resumed = (rollouts(engine, Numbers(30), resample_rounds=2) for engine in (one, other))
    straight.next_batch(0)
    resumed.restore(json.loads(json.dumps(straight.state())))
    assert taught(other, resumed, 1) == taught(one, straight, 1)


# pass@k


def test_pass_at_k_is_the_share_solved_by_one_of_the_first_k(tokenizer: Tokenizer) -> None:
    outcomes = [[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]
    engine: Any = ScriptedEngine(tokenizer, lambda question, sample: bool(outcomes[question][sample]))
    got = pass_at_k(engine, Numbers(5), rl_config(), seed=0)  # type: ignore[arg-type]
    means = {name: value for name, value in got.items() if not name.endswith("_stderr")}
    assert means == {"pass_at_1": 0.2, "pass_at_2": 0.4, "pass_at_3": 0.6, "pass_at_4": 0.8, "held_out_reward": 0.3}


def test_standard_errors_are_those_of_means_over_problems() -> None:
    outcomes = np.array([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=bool)
    got = summarise(outcomes)
    for k, solved in ((1, 1), (2, 2), (3, 3), (4, 4)):
        share = solved / 5
        assert got[f"pass_at_{k}_stderr"] == pytest.approx(np.sqrt(share * (1 - share) / 5))
    shares = [0.5, 0.25, 0.0, 0.5, 0.25]
    assert got["held_out_reward_stderr"] == pytest.approx(np.std(shares) / np.sqrt(5))


def test_pass_at_k_asks_every_problem_also_beyond_one_pass(tokenizer: Tokenizer) -> None:
    """128 rows are answered at a time: 32 problems of four samples."""
    engine: Any = ScriptedEngine(tokenizer, lambda question, sample: question % 2 == 0)
    assert pass_at_k(engine, Numbers(70), rl_config(), seed=0)["pass_at_1"] == 0.5  # type: ignore[arg-type]
    assert sorted({question for batch in engine.asked for question in batch}) == list(range(70))
    assert max(map(len, engine.asked)) <= 128
    assert len(set(engine.seeds)) == len(engine.asked)


# Several updates, divergence, entropy


def scored(tokenizer: Tokenizer, log: Callable[[dict[str, Any]], None], **changes: Any) -> Rollouts:
    """Return a source whose model, task and scores are real ones in small."""
    task: Any = Numbers(6)
    task.evaluate = lambda conversation, response: len(response) % 2 == 0
    model = make_model()
    return Rollouts(
        Engine(model, tokenizer),
        task,
        rl_config(**changes),
        seed=3,
        log=log,
        scores=PolicyScores(model, micro_tokens=4096, dtype=mx.float32),
        reference=flatten_parameters(model) if changes.get("kl_coefficient") else None,
    )


SEVERAL = {"minibatches_per_rollout": 2, "passes_per_rollout": 2, "clip_low": 0.2, "clip_high": 0.2}


def test_in_the_middle_of_a_rollout_it_goes_on_with_the_answers_and_probabilities_it_had(tokenizer: Tokenizer) -> None:
    """The state as JSON; the model as it was then; equal to the bit."""
    straight = scored(tokenizer, lambda record: None, kl_coefficient=0.1, **SEVERAL)
    model = straight.engine.model
    began = flatten_parameters(model)
    step = TrainStep(model, make_optimizer(model), micro_tokens=4096, dtype=mx.float32)
    for iteration in range(3):
        step(straight.next_batch(iteration), Rates(0.5, 0.9, 1.0))
    state = json.loads(json.dumps(straight.state()))
    resumed = scored(tokenizer, lambda record: None, kl_coefficient=0.1, **SEVERAL)
    set_parameters(resumed.engine.model, flatten_parameters(model))
    resumed.restore(state)
    for iteration in (3, 4):
        got, expected = resumed.next_batch(iteration), straight.next_batch(iteration)
        for name in ("ids", "targets", "weights"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    assert not all((flatten_parameters(model)[name] == value).all() for name, value in began.items())


def test_ratios_leave_one_when_the_model_has_moved_and_the_divergence_leaves_zero(tokenizer: Tokenizer) -> None:
    log: list[dict[str, Any]] = []
    source = scored(tokenizer, log.append, kl_coefficient=0.1, **SEVERAL)
    model = source.engine.model
    step = TrainStep(model, make_optimizer(model), micro_tokens=4096, dtype=mx.float32)
    for iteration in range(3):
        step(source.next_batch(iteration), Rates(0.5, 0.9, 1.0))
    updates = [record for record in log if "ratio" in record]
    assert [record["iteration"] for record in updates] == [1, 2, 3]
    assert (updates[0]["ratio"], updates[0]["kl"]) == (1.0, 0.0)
    assert updates[2]["ratio"] != 1.0
    assert updates[2]["kl"] > 0


def test_scores_are_the_log_probabilities_and_entropies_of_the_whole_distribution() -> None:
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


def test_with_one_update_and_no_divergence_nothing_is_scored_but_where_entropy_is_asked_for(
    tokenizer: Tokenizer,
) -> None:
    log: list[dict[str, Any]] = []
    source = scored(tokenizer, log.append, entropy_every=2)
    for iteration in range(3):
        source.next_batch(iteration)
    assert ["entropy" in record for record in log] == [True, False, True]
    assert source.state() == {"mean_reward": source.mean_reward}


def test_answers_that_were_cut_are_left_out_on_request(tokenizer: Tokenizer) -> None:
    made = scored(tokenizer, lambda record: None, max_new_tokens=2, train_unfinished=False).next_batch(0)
    whole = scored(tokenizer, lambda record: None, max_new_tokens=2).next_batch(0)
    assert (made.targets >= 0).sum() < (whole.targets >= 0).sum()


def test_a_minibatch_holds_whole_questions_and_all_are_trained(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, lambda question, sample: sample == 0)
    source = rollouts(engine, Numbers(4), minibatches_per_rollout=2)
    source._scores = lambda ids, targets, parameters: (np.zeros(ids.shape), np.zeros(ids.shape))  # type: ignore
    held = []
    for iteration in range(4):
        assert (source.next_batch(iteration).targets >= 0).any(axis=1).sum() == 4
        held += source.documents()
    assert len(engine.asked) == 2
    assert sorted(held) == [f"question {index}" for index in range(4)]
