"""The sizes of models that a pipeline takes in instead of making them: what plans of steps below them need to know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mlxchat.config import Config
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import GPTSizes
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROLE = "checkpoint"


def find_given_sizes(config: Config, plan: Iterable[PlannedStep]) -> dict[str, GPTSizes]:
    """Return step → sizes of the steps that take in a model, and of those that go on from one; of others nothing.

    Raises:
        DataError: a model that is to be taken in is not there, or what describes it is damaged.
    """
    store = Store(Path(config.outputs))
    found: dict[str, GPTSizes] = {}
    for step in plan:  # inputs come first
        artifact: Mapping[str, object] | None = step.artifacts.get(_ROLE)
        if step.stage.name == "imported" and not step.stage.optional_inputs.keys() & {*step.inputs, *step.artifacts}:
            made = store.find(step.rid) if step.done else None
            found[step.name] = _of_folder(made) if made is not None else _of_config(config)
        elif step.inputs.get(_ROLE) in found:
            found[step.name] = found[step.inputs[_ROLE]]
        elif artifact is not None and (folder := store.find(str(artifact["rid"]))) is not None:
            found[step.name] = _of_folder(folder)
    return found


def check_given(config: Config, plan: Iterable[PlannedStep]) -> None:
    """Refuse to train a model that was taken in on rows longer than its context.

    Raises:
        ConfigError: naming each step, both lengths and the setting.
    """
    plan = list(plan)
    given = find_given_sizes(config, plan)
    problems = []
    for step in plan:
        section = step.stage.name
        if step.done or step.name not in given or section not in ("midtrain", "sft"):
            continue
        rows, context = getattr(config, section).batch.row_tokens, given[step.name].context_tokens
        if rows > context:
            problems.append(
                f"{section}.batch.row_tokens={rows} is longer than the context of the model that {step.name} goes on "
                f"from: {context}. Give {section}.batch.row_tokens={context}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def describe_imports(config: Config, plan: Iterable[PlannedStep]) -> dict[str, str]:
    """Return step → what is known of the model that it will take in, for people."""
    steps = [step.name for step in plan if step.stage.name == "imported" and not step.done]
    if not steps:
        return {}
    from mlxchat.interop.importing import describe_import

    return dict.fromkeys(steps, describe_import(config.imported))


def _of_folder(folder: Path) -> GPTSizes:
    from mlxchat.interop.names import sizes_from_hf

    return sizes_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder.name)


def _of_config(config: Config) -> GPTSizes:
    from mlxchat.interop.importing import sizes_of_import  # only where something is taken in

    return sizes_of_import(config.imported)
