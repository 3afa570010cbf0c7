"""Whether a step can extend the finished training that its `extend` names. Imports no MLX."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mlxchat.model.sizes import sizes_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.fingerprint import changes, flatten, left_out_of
from mlxchat.store.manifest import CONTINUATION, Manifest
from mlxchat.store.store import SAVED, Store

_MOST_SHOWN = 12  # settings that differ


def find_extension_problems(
    step: PlannedStep,
    plan: list[PlannedStep],
    *,
    same: tuple[str, ...],
    may_differ: tuple[str, ...] = (),
    count_wanted: Callable[[Mapping[str, Any]], int | None],
) -> Iterator[str]:
    """Yield why a step cannot extend the training that it names; nothing if it names none.

    Args:
        step: its artifact in the role `extends` is the finished training.
        plan: all steps.
        same: sections and settings that weights, moments or the position in the data depend on.
        may_differ: exceptions from these.
        count_wanted: returns the total iterations of the step from what the finished training derived; None: unknown
            before it runs.
    """
    extended = step.artifacts.get("extends")
    if extended is None:
        return
    stage = step.stage.name
    derived = extended["derived"]
    if extended["stage"] == stage:
        found = [
            *_find_missing_state(extended),
            *_find_changed_settings(step, extended, same, may_differ),
            *_find_changed_inputs(step, plan, extended),
        ]
    elif (extended["stage"], stage) == ("imported", "pretrain"):
        found = [*_find_missing_state(extended)] or [*_find_model_differences(step, plan, extended)]
        derived = derived if found else {**derived, "num_iterations": _updates_of_import(step, extended)}
    else:
        found = [f"{extended['name']} is made by stage {extended['stage']}; only stage {stage}'s own can be extended"]
    if not found:
        wanted, done = count_wanted(derived), derived["num_iterations"]
        if wanted is not None and wanted <= done:
            found = [
                f"{extended['name']} already has {done} iterations, and the horizon counts {wanted} from the start: "
                f"give {stage}.num_iterations more than {done}"
            ]
    yield from (f"{stage}.extend={getattr(step.config, stage).extend}: {line}" for line in found)


def keeps_state(manifest: Manifest) -> bool:
    """Return True if a finished training contains what an extension needs: moments and position."""
    return {file["path"] for file in manifest["outputs"]}.issuperset(CONTINUATION)


def _find_missing_state(extended: Manifest) -> Iterator[str]:
    if keeps_state(extended):
        return
    if extended["stage"] == "imported":
        yield f"{extended['name']} has no moments. Import it again: mlxchat import nanochat WHAT --optimizer --replace"
    else:
        yield (
            f"{extended['name']} has no training state. Train it again with its settings and "
            f"{extended['stage']}.save_training_state=true 'force=[{extended['step'].partition(SAVED)[0]}]'"
        )


def _find_changed_settings(
    step: PlannedStep, extended: Manifest, same: tuple[str, ...], may_differ: tuple[str, ...]
) -> Iterator[str]:
    def of(names: tuple[str, ...], key: str) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in names)

    before, now = (
        flatten(identity) | {pin.partition(" ")[2]: digest for pin, digest in pins.items()}
        for identity, pins in ((extended["config"], extended["pins"]), (step.identity, step.externals))
    )
    differing = changes(before, now, flatten(left_out_of(step.sections)))
    keys = sorted(key for key in differing if of(same, key) and not of(may_differ, key))
    for key in islice(keys, _MOST_SHOWN):
        yield f"{key} is {differing[key][1]}, but {extended['name']} was made with {differing[key][0]}"
    if len(keys) > _MOST_SHOWN:
        yield f"{len(keys) - _MOST_SHOWN} more settings differ: mlxchat show {extended['name']}"


def _find_changed_inputs(step: PlannedStep, plan: list[PlannedStep], extended: Manifest) -> Iterator[str]:
    planned = {each.name: each for each in plan}
    now = step.inputs_made(Store(Path(step.config.outputs)), planned)
    for role in step.stage.inputs:
        made = extended["inputs"].get(role, {})
        if role not in now or made.get("tree") != now[role]["tree"]:
            here = now[role]["name"] if role in now else planned[step.inputs[role]].title
            yield f"its {role} is {here}, but {extended['name']} was made with {made.get('artifact')}"


def _find_model_differences(step: PlannedStep, plan: list[PlannedStep], extended: Manifest) -> Iterator[str]:
    """Yield differences between an imported model and the one to be trained; the text is read from its beginning."""
    # Imported here because other plans need neither.
    from mlxchat.data.tokenizer import Tokenizer
    from mlxchat.planning.given import sizes_of_folder

    store, name = Store(Path(step.config.outputs)), extended["name"]
    folder, tokenizer = (
        _folder(store, extended),
        step.inputs_made(store, {each.name: each for each in plan}).get("tokenizer"),
    )
    theirs = sizes_of_folder(folder)
    ours = sizes_of(step.config.model, step.config.architecture, theirs.vocab_size)
    for key, value in ours.to_dict().items():
        if value != getattr(theirs, key):
            yield f"the model has {key} {value}, but {name} has {getattr(theirs, key)}"
    if tokenizer is None:
        yield f"its tokenizer is not made yet. First: mlxchat stage=tokenizer tokenizer.source={folder}"
    elif Tokenizer.load(_folder(store, tokenizer)).digest != Tokenizer.load(folder).digest:
        yield f"its tokenizer is {tokenizer['name']}, but {name} has its own: give tokenizer.source={folder}"


def _updates_of_import(step: PlannedStep, extended: Manifest) -> int:
    folder = _folder(Store(Path(step.config.outputs)), extended)
    return int(json.loads((folder / CONTINUATION[1]).read_text(encoding="utf-8"))["iteration"])


def _folder(store: Store, manifest: Manifest) -> Path:
    folder = store.find(manifest["rid"])
    assert folder is not None, "found while planning"
    return folder
