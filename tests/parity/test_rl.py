"""Advantages, trained tokens and policy gradients of both snapshots, multipliers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kit.training import rollout_of
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import ScheduleConfig
from mlxchat.data.packing import Batch
from mlxchat.engine.generate import Completion
from mlxchat.optim.optimizer import lr_multiplier
from mlxchat.rl.loss import advantages_of, policy_loss
from parity.test_model import ZERO, loss_and_gradients, losses_of
from parity.values import VARIANTS, Array, assert_same, assert_within, of_files

RELATIVE = 1e-5
# For the gradient of one parameter: its first values relative to the largest, its sum relative to its 1-norm.
PARTS = 1e-4
each_file = of_files("rl_*.json")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def batch_of(case: dict[str, Any], padding: int) -> Batch:
    """Return our batch of a case's rows with the recipe rl=nanochat."""
    prompts, completions, advantages, settings = [], [], [], case["settings"]
    for example in case["examples"]:
        start = example["prompt_length"]
        for ids, mask in zip(example["sequences"], example["masks"], strict=True):
            prompts.append(ids[:start])
            completions.append(Completion(ids=ids[start:], mask=mask[start:]))
        advantages += example["advantages"]
    config = replace(
        compose_config(["rl=nanochat"]).config.rl,
        samples_per_question=settings["num_samples"], answers_per_pass=settings["device_batch_size"],
    )  # fmt: skip
    rollout = rollout_of(prompts, completions, np.array(advantages), padding=padding)
    return rollout.batch(policy_loss(rollout.mask, np.array(advantages), config).weights, padding=padding)


@each_file
def test_advantages_and_multipliers(values):
    for case in values.json["cases"]:
        for example in case["examples"]:
            got = advantages_of(np.array([example["rewards"]]), "mean")[0]
            assert np.abs(np.subtract(got, example["advantages"])).max() <= 1e-6
        schedule = ScheduleConfig(warmup_frac=0.0, warmdown_frac=1.0, final_lr_frac=0.0, shape="linear")
        got = lr_multiplier(case["settings"]["step"], case["settings"]["num_steps"], schedule)
        assert got == pytest.approx(case["lr_multiplier"], abs=1e-9)


@each_file
def test_trained_tokens(values):
    """Inputs and targets of the rows with an advantage; ours leaves out the others, which have no effect."""
    padding, pairs = values.tokenizer.assistant_end, []
    for case in values.json["cases"]:
        batch = batch_of(case, padding)
        advantages, inputs, targets = (
            [row for example in case["examples"] for row in example[key]] for key in ("advantages", "inputs", "targets")
        )
        for row, index in enumerate(np.flatnonzero(advantages)):
            # Our rows are as wide as the longest of the iteration, nanochat's as the longest of the example.
            length = len(inputs[index])
            found = batch.ids[row][:length].tolist(), batch.targets[row][:length].tolist()
            ours = [(each + [fill] * length)[:length] for each, fill in zip(found, (padding, -1), strict=True)]
            pairs.append((f"{case['name']}, row {index}", ours, [inputs[index], targets[index]]))
            assert (batch.targets[row][length:] == -1).all()
    assert_same(pairs)


def gradient_error(got: Array, values: dict[str, Any], zero: float) -> float:
    """Return the largest relative error of a gradient's norm, sum and first values; below `zero` both are 0."""
    first = np.array(values["first"])
    if values["norm"] < zero:
        return 0.0 if np.linalg.norm(got) < zero else np.inf
    flat = got.astype(np.float64).reshape(-1)
    norm = abs(np.linalg.norm(flat) - values["norm"]) / max(values["norm"], 1e-30)
    total = abs(flat.sum() - values["sum"]) / max(np.abs(flat).sum(), 1e-30)
    begin = np.abs(flat[: first.size] - first).max() / max(np.abs(flat).max(), 1e-30)
    return float(np.max([norm, total, begin]))


@each_file
@each_variant
def test_policy_gradient(values, variant):
    """Log-probabilities, loss and gradients of the recipe rl=nanochat."""
    model, losses, norms, parts, logps = values.core_model(variant), {}, {}, {}, {}
    for case in values.json["cases"]:
        loss, gradients = loss_and_gradients(model, batch_of(case, values.tokenizer.assistant_end))
        expected, name = case[variant], case["name"]
        losses[name] = abs(loss - expected["loss_sum_over_passes"])
        total = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in gradients.values()))
        norms[name] = abs(total / expected["grad_norm_total"] - 1)
        assert gradients.keys() == expected["grads"].keys()
        zero = ZERO * expected["grad_norm_total"]
        for parameter, numbers in expected["grads"].items():
            parts[f"{name}: {parameter}"] = gradient_error(gradients[parameter], numbers, zero)
        rows = case["settings"]["device_batch_size"]
        for place, example in enumerate(case["examples"]):
            logp = -losses_of(model, example["inputs"], example["targets"])
            for start, each in enumerate(example[variant]["logp"]):
                error = float(np.abs(np.subtract(logp[start * rows : (start + 1) * rows], each)).max())
                logps[f"{name}, example {place}, pass {start}"] = error
    assert_within(1e-4, logps)
    assert_within(RELATIVE, losses)
    assert_within(RELATIVE, norms)
    assert_within(PARTS, parts)
