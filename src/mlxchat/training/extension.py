"""Whether a step can continue the finished training that its `extend` names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlxchat.runner.plan import PlannedStep
from mlxchat.store.fingerprint import changes, flatten, left_out_of
from mlxchat.store.manifest import CONTINUATION
from mlxchat.store.store import SAVED, Store


def find_extension_problems(step: PlannedStep, plan: list[PlannedStep], same: tuple[str, ...]) -> Iterator[str]:
    """Yield why a step cannot extend the training that it names; nothing if it names none.

    `same` names the sections and settings that weights, moments or the position in the data depend on.
    """
    extended = step.artifacts.get("extends")
    if extended is None:
        return
    stage, name = step.stage.name, extended["name"]
    where = f"{stage}.extend={getattr(step.config, stage).extend}:"
    if extended["stage"] != stage:
        yield f"{where} {name} is made by stage {extended['stage']}; only stage {stage}'s own can be extended"
        return
    if not {file["path"] for file in extended["outputs"]}.issuperset(CONTINUATION):
        yield (
            f"{where} {name} has no training state. Train it again with its settings and "
            f"{stage}.save_training_state=true 'force=[{extended['step'].partition(SAVED)[0]}]'"
        )
    wanted, done = getattr(step.config, stage).num_iterations, extended["derived"]["num_iterations"]
    if wanted is not None and wanted <= done:
        yield f"{where} {name} already has {done} iterations: give {stage}.num_iterations more than {done}"
    before, now = (
        flatten(identity) | {pin.partition(" ")[2]: digest for pin, digest in pins.items()}
        for identity, pins in ((extended["config"], extended["pins"]), (step.identity, step.externals))
    )
    for key, (old, new) in sorted(changes(before, now, flatten(left_out_of(step.sections))).items()):
        if any(f"{key}.".startswith(f"{each}.") for each in same) and key != "architecture.dropout":
            yield f"{where} {key} is {new}, but {name} was made with {old}"
    planned = {each.name: each for each in plan}
    inputs = step.inputs_made(Store(Path(step.config.outputs)), planned)
    for role in step.stage.inputs:
        made = extended["inputs"].get(role, {})
        if role not in inputs or made.get("tree") != inputs[role]["tree"]:
            here = inputs[role]["name"] if role in inputs else planned[step.inputs[role]].title
            yield f"{where} its {role} is {here}, but {name} was made with {made.get('artifact')}"
