"""Whether a step can continue the finished training that its `extend` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxchat.runner.plan import PlannedStep
from mlxchat.store.fingerprint import changes, flatten, left_out_of
from mlxchat.store.manifest import CONTINUATION, Manifest
from mlxchat.store.store import SAVED, Store


def find_extension_problems(
    step: PlannedStep,
    plan: list[PlannedStep],
    *,
    same: tuple[str, ...],
    may_differ: tuple[str, ...] = (),
    count_wanted: Callable[[Mapping[str, Any]], int | None],
) -> Iterator[str]:
    """Yield why a step cannot extend the training that it names; nothing if it names none.

    `same` names the sections and settings that weights, moments or the position in the data depend on, except
    `may_differ`. `count_wanted` returns the step's total iterations from what the finished training derived; None:
    unknown before it runs.
    """
    extended = step.artifacts.get("extends")
    if extended is None:
        return
    stage, name = step.stage.name, extended["name"]
    if extended["stage"] != stage:
        found = [f"{name} is made by stage {extended['stage']}; only stage {stage}'s own can be extended"]
    else:
        state = [] if keeps_state(extended) else [f"{name} has no training state. {train_again(extended)}"]
        found = [*state, *_find_changes(step, extended, same, may_differ), *_find_other_inputs(step, plan, extended)]
    if not found:
        wanted, done = count_wanted(extended["derived"]), extended["derived"]["num_iterations"]
        if wanted is not None and wanted <= done:
            found = [
                f"{name} already has {done} iterations, and the horizon counts {wanted} from the start: "
                f"give {stage}.num_iterations more than {done}"
            ]
    yield from (f"{stage}.extend={getattr(step.config, stage).extend}: {line}" for line in found)


def keeps_state(manifest: Manifest) -> bool:
    """Return True if a finished training contains what an extension needs: moments and position."""
    return {file["path"] for file in manifest["outputs"]}.issuperset(CONTINUATION)


def train_again(manifest: Manifest) -> str:
    """Return what to do to get the state of a training that was made without it."""
    step = manifest["step"].partition(SAVED)[0]
    return f"Train it again with its settings and {manifest['stage']}.save_training_state=true 'force=[{step}]'"


def _find_changes(
    step: PlannedStep, extended: Manifest, same: tuple[str, ...], may_differ: tuple[str, ...]
) -> Iterator[str]:
    """Yield the settings and external files on which the training depends and which changed."""

    def is_of(names: tuple[str, ...], key: str) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in names)

    before, now = (
        flatten(identity) | {pin.partition(" ")[2]: digest for pin, digest in pins.items()}
        for identity, pins in ((extended["config"], extended["pins"]), (step.identity, step.externals))
    )
    for key, (old, new) in sorted(changes(before, now, flatten(left_out_of(step.sections))).items()):
        if is_of(same, key) and not is_of(may_differ, key):
            yield f"{key} is {new}, but {extended['name']} was made with {old}"


def _find_other_inputs(step: PlannedStep, plan: list[PlannedStep], extended: Manifest) -> Iterator[str]:
    planned = {each.name: each for each in plan}
    now = step.inputs_made(Store(Path(step.config.outputs)), planned)
    for role in step.stage.inputs:
        made = extended["inputs"].get(role, {})
        if role not in now or made.get("tree") != now[role]["tree"]:
            here = now[role]["name"] if role in now else planned[step.inputs[role]].title
            yield f"its {role} is {here}, but {extended['name']} was made with {made.get('artifact')}"
