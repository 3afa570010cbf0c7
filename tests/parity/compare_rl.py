"""rl_*.json: advantages, trained tokens, policy gradients and updates of both snapshots, multipliers and pass@k."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from compare_model import ZERO, loss_and_gradients, optimizer_of
from comparison import Comparison, Quantity, distance, largest, same
from parity_file import ParityFile

from kit.training import rollout_of
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import ScheduleConfig
from mlxchat.engine.generate import Completion
from mlxchat.model.parameters import flatten_parameters
from mlxchat.ops.loss import token_scores
from mlxchat.optim.optimizer import Rates, lr_multiplier
from mlxchat.rl.loss import advantages_of, policy_loss
from mlxchat.training.batches import Batch
from mlxchat.training.step import TrainStep

VARIANTS = ("oct2025", "jul2026")
RELATIVE = 1e-5
# For the gradient of one parameter: its first values relative to the largest, its sum relative to its 1-norm.
PARTS = 1e-4
# oct2025 orthogonalises in bfloat16, whose rounding alone changes the norm of a step by 1 %.
MATRICES = {"oct2025": 2e-2, "jul2026": 1e-4}


def advantages(file: ParityFile) -> Iterator[Comparison]:
    """Compare advantages: rewards minus their mean."""
    errors = {
        f"{case['name']}, example {index}": distance(
            advantages_of(np.array([example["rewards"]]), "mean")[0], example["advantages"]
        )
        for case in file.json["cases"]
        for index, example in enumerate(case["examples"])
    }
    yield largest("advantages, absolute", errors, 1e-6)


def trained_tokens(file: ParityFile) -> Iterator[Comparison]:
    """Compare inputs and targets of the rows with an advantage; ours leaves out the others, which have no effect."""
    padding, pairs = file.tokenizer().assistant_end, []
    for case in file.json["cases"]:
        _, _, weights = _rows(case)
        batch = _batch(case, padding=padding)
        inputs = [row for example in case["examples"] for row in example["inputs"]]
        targets = [row for example in case["examples"] for row in example["targets"]]
        for row, index in enumerate(np.flatnonzero(weights)):
            # Our rows are as wide as the longest of the iteration, nanochat's as the longest of the example.
            length = len(inputs[index])
            width = max(batch.ids.shape[1], length)
            got = (
                _padded(batch.ids[row].tolist(), width, padding)[:length],
                _padded(batch.targets[row].tolist(), width, -1),
            )
            expected = inputs[index], _padded(targets[index], width, -1)
            pairs.append((f"{case['name']}, row {index}", got, expected))
    yield same("inputs and targets", pairs)


def policy_gradient(file: ParityFile) -> Iterator[Comparison]:
    """Compare log-probabilities, loss and gradients of the recipe rl=nanochat."""
    padding = file.tokenizer().assistant_end
    for variant in VARIANTS:
        model = file.core_model(variant)
        losses, norms, parts, logps = {}, {}, {}, {}
        for case in file.json["cases"]:
            batch = _batch(case, padding=padding)
            loss, gradients = loss_and_gradients(model, batch)
            expected, name = case[variant], case["name"]
            losses[name] = abs(loss - expected["loss_sum_over_passes"])
            total = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in gradients.values()))
            norms[name] = abs(total / expected["grad_norm_total"] - 1)
            if gradients.keys() != expected["grads"].keys():
                parts[f"{name}: parameters"] = float("inf")
            for parameter, values in expected["grads"].items():
                zero = ZERO * expected["grad_norm_total"]
                parts[f"{name}: {parameter}"] = _gradient_error(gradients.get(parameter, np.zeros(0)), values, zero)
            logps[name] = max(
                distance(_log_probabilities(model, example, start, case), each)
                for example in case["examples"]
                for start, each in enumerate(example[variant]["logp"])
            )
        yield largest(f"log-probabilities, absolute, {variant}", logps, 1e-4)
        yield largest(f"loss, absolute, {variant}", losses, RELATIVE)
        yield largest(f"norm of all gradients, relative, {variant}", norms, RELATIVE)
        yield largest(f"each gradient's norm, sum and first values, {variant}", parts, PARTS)


def update(file: ParityFile) -> Iterator[Comparison]:
    """Compare how far one step moves each parameter."""
    padding = file.tokenizer().assistant_end
    for variant in VARIANTS:
        matrices, rest = {}, {}
        for case in file.json["cases"]:
            batch = _batch(case, padding=padding)
            model, settings = file.core_model(variant), case["settings"]
            before = {name: np.array(value) for name, value in flatten_parameters(model).items()}
            rates = {key: settings[key] for key in ("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay")}
            optimizer = optimizer_of(model, variant, mx.float32, lr_frac=settings["init_lr_frac"], **rates)
            step = TrainStep(model, optimizer, micro_tokens=1 << 30, dtype=mx.float32)
            step(batch, Rates(case["lr_multiplier"], 0.95, 0.0))
            moved = {name: np.asarray(value) - before[name] for name, value in flatten_parameters(model).items()}
            for name, expected in case[variant]["update_norms"].items():
                if case[variant]["grads"][name]["norm"] < ZERO * case[variant]["grad_norm_total"]:
                    continue  # AdamW makes a whole step of a gradient that is 0 except for rounding
                error = abs(np.linalg.norm(moved[name]) / expected - 1) if name in moved else float("inf")
                (matrices if ".h." in name else rest)[f"{case['name']}: {name}"] = float(error)
        yield largest(f"one step's norm, relative: matrices, {variant}", matrices, MATRICES[variant])
        yield largest(f"one step's norm, relative: the rest, {variant}", rest, 1e-3)


def multipliers(file: ParityFile) -> Iterator[Comparison]:
    """Compare the multiplier of the learning rates, 1 − step / num_steps."""
    errors = {}
    for case in file.json["cases"]:
        step, steps = case["settings"]["step"], case["settings"]["num_steps"]
        schedule = ScheduleConfig(warmup_frac=0.0, warmdown_frac=1.0, final_lr_frac=0.0, shape="linear")
        got = lr_multiplier(step, steps, schedule)
        errors[case["name"]] = abs(got - case["lr_multiplier"])
    yield largest("multipliers, absolute", errors, 1e-9)


def passes(file: ParityFile) -> Iterator[Comparison]:
    """Compare pass@k by the formula of our loop; the number of steps is our plan's and is not compared."""
    if "pass_at_k" in file.json:
        values = file.json["pass_at_k"]
        outcomes = np.array(values["outcomes"], dtype=bool)
        got = [outcomes[:, :k].any(axis=1).mean() for k in range(1, outcomes.shape[1] + 1)]
        yield Comparison("pass@k, absolute", distance(got, values["pass_at_k"]), 1e-6)


QUANTITIES: tuple[Quantity, ...] = (advantages, trained_tokens, policy_gradient, update, multipliers, passes)


def _rows(case: dict[str, Any]) -> tuple[list[list[int]], list[Completion], np.ndarray[Any, Any]]:
    prompts, completions, weights = [], [], []
    for example in case["examples"]:
        start = example["prompt_length"]
        for ids, mask in zip(example["sequences"], example["masks"], strict=True):
            prompts.append(ids[:start])
            completions.append(Completion(ids=ids[start:], mask=mask[start:]))
        weights += example["advantages"]
    return prompts, completions, np.array(weights)


def _batch(case: dict[str, Any], *, padding: int) -> Batch:
    """Return our batch of a case's rows with the recipe rl=nanochat."""
    (prompts, completions, advantages), settings = _rows(case), case["settings"]
    config = replace(
        compose_config(["rl=nanochat"]).config.rl,
        samples_per_question=settings["num_samples"], answers_per_pass=settings["device_batch_size"],
    )  # fmt: skip
    rollout = rollout_of(prompts, completions, advantages, padding=padding)
    return rollout.batch(policy_loss(rollout.mask, advantages, config).weights, padding=padding)


def _log_probabilities(model: Any, example: dict[str, Any], number: int, case: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the log-probabilities of a pass's targets (rows, T), 0 where a row has no target."""
    rows = case["settings"]["device_batch_size"]
    ids, targets = (np.array(example[key][number * rows : (number + 1) * rows]) for key in ("inputs", "targets"))
    hidden = model.hidden(mx.array(ids)).reshape(-1, model.sizes.width)
    (losses,) = token_scores(hidden, model.head_weight, mx.array(targets.reshape(-1)), ["losses"])
    return -np.asarray(losses).reshape(targets.shape)


def _gradient_error(got: np.ndarray[Any, Any], values: dict[str, Any], zero: float) -> float:
    """Return the largest of the relative errors of a gradient's norm, sum and first values.

    Below `zero` a gradient is 0 except for rounding, and ours must be as well.
    """
    first = np.array(values["first"])
    if values["norm"] < zero:
        return 0.0 if np.linalg.norm(got) < zero else float("inf")
    if got.size < first.size or not got.size:
        return float("inf")
    flat = got.astype(np.float64).reshape(-1)
    norm = abs(np.linalg.norm(flat) - values["norm"]) / max(values["norm"], 1e-30)
    total = abs(flat.sum() - values["sum"]) / max(float(np.abs(flat).sum()), 1e-30)
    begin = float(np.abs(flat[: first.size] - first).max()) / max(float(np.abs(flat).max()), 1e-30)
    return float(np.max([norm, total, begin]))


def _padded(ids: list[int], width: int, padding: int) -> list[int]:
    return ids + [padding] * (width - len(ids))
