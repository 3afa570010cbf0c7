"""May this pretraining extend that one? Answered while planning, without MLX, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxchat.config import Config
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import sizes_of
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.runner.plan import PlannedStep, flatten_config
from mlxchat.runner.store import CONTINUATION, Manifest

# What weights and moments have the shape of, or are the meaning of, and what a position in the data is counted in.
_SAME = ("model", "architecture", "optimizer.kind", "optimizer.variant", "pretrain.packing")
_MAY_DIFFER = ("architecture.dropout",)


def check_extensions(config: Config, plan: list[PlannedStep]) -> None:
    """Check each step of the plan that is to run and extends a finished training.

    Raises:
        ConfigError: naming everything that keeps it from being extended.
    """
    planned = {step.name: step for step in plan}
    for step in plan:
        extended = step.artifacts.get("extends")
        if extended is None or step.done:
            continue
        problems = [*_what_lacks(extended), *_what_differs(step, extended, planned)]
        if not problems:
            problems = _what_is_done(config, extended)
        if problems:
            raise ConfigError("\n".join(f"pretrain.extend={config.pretrain.extend}: {line}" for line in problems))


def _what_lacks(extended: Manifest) -> list[str]:
    if extended["stage"] != "pretrain":
        return [f"{extended['name']} is made by stage {extended['stage']}; only a pretraining can be extended"]
    if not {file["path"] for file in extended["outputs"]}.issuperset(CONTINUATION):
        return [
            f"{extended['name']} kept no training state. Make it once more with the settings it was made with, and "
            f"pretrain.save_training_state=true 'force=[{extended['step']}]'"
        ]
    return []


def _what_differs(step: PlannedStep, extended: Manifest, planned: Mapping[str, PlannedStep]) -> list[str]:
    if extended["stage"] != step.stage.name:
        return []
    problems = []
    now, before = _comparable(step.identity), _comparable(extended["config"])
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            problems.append(f"{key} is {now.get(key)}, but {extended['name']} was made with {before.get(key)}")
    for role, source in step.inputs.items():
        made = extended["inputs"].get(role, {})
        if made.get("rid") != planned[source].rid:
            artifact = made.get("artifact")
            problems.append(
                f"its {role} is {planned[source].artifact}, but {extended['name']} was made with {artifact}"
            )
    return problems


def _comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in flatten_config(identity).items() if key not in _MAY_DIFFER}
    flat.setdefault("pretrain.packing", "best_fit")  # an identity leaves it out
    return {key: value for key, value in flat.items() if key in _SAME or key.partition(".")[0] in _SAME}


def _what_is_done(config: Config, extended: Manifest) -> list[str]:
    """Return a line if the horizon asks for no more than there is."""
    vocab_size, done = extended["derived"]["vocab_size"], extended["derived"]["num_iterations"]
    sizes = sizes_of(config.model, config.architecture, vocab_size)
    wanted = derive_hyperparameters(config, sizes).num_iterations
    if wanted > done:
        return []
    return [
        f"{extended['name']} already has {done} iterations, and the horizon asks for {wanted} in all, from the "
        f"beginning on: give pretrain.num_iterations more than {done}"
    ]
