"""Names of artifacts and runs, resolved here for all verbs.

sft                             a step of the latest run; if that run lacks it, of the last run that has it
latest/sft, RUN/sft             a step of a run; of a training in progress, its last intermediate model
sft@500, RUN/sft@500            the model after 500 iterations of a training (save_every)
latest, RUN                     a run; where one artifact is expected, the run's model
best, pins/best                 a pin; where a step of the latest run has its name, only pins/best
town-sweep/best                 the best model of a sweep
import:d32                      a model that was imported under this name
247by4                          an id, or a prefix that only one id has
sft-d4-247by4vjkvu7s7hg         an artifact's folder, also as a path: outputs/store/sft-d4-247by…

RUN is the name of a run's folder, also as a path, or its last part (quickstart), which means the last such run.
The latest run is the last one that finished a model; `refs/latest` links to its refs.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mlxchat.config.wording import first_of
from mlxchat.errors import StoreError, suggest, visible
from mlxchat.store import locks
from mlxchat.store.files import list_folder
from mlxchat.store.manifest import MANIFEST, Manifest, read_manifest
from mlxchat.store.store import SAVED, Store, clean_label

LATEST, PINS, IMPORTS = "latest", "pins", "imports"
MODEL = "checkpoint"
"""The kind of artifacts that are models."""
BEST = "best"
_ID_CHARS = 16
_MOST_SHOWN = 8
# In order of preference, chat models first.
_STAGES = ("rl", "preference", "sft", "midtrain", "pretrain", "fused", "imported")
_STAMP = re.compile(r"(\d{8}-\d{6})(?:-\d{6})?(?:-\d+-(?P<called>.+))?$")
_JOB = re.compile(r".-(job\d+|trial\d+|shared)$")


class Found(NamedTuple):
    """An artifact, and the run through which its name was resolved."""

    place: Path  # its folder
    run: str | None = None  # the run's folder; None if the name is that of an artifact, a pin or an import


class Run(NamedTuple):
    """A run: the name of its folders in refs/ and runs/."""

    name: str


def resolve(store: Store, name: str) -> Path:
    """Return the folder of the artifact with this name, as `find`."""
    return find(store, name).place


def find(store: Store, name: str) -> Found:
    """Return the artifact with this name; the name of a run gives the run's model."""
    meant = meaning(store, name)
    if isinstance(meant, Found):
        return meant
    steps = links(store, meant.name)
    if (place := model_of(steps) or _last_saved(steps)) is None:
        has = f"has no model, only {', '.join(steps)}: use {name}/STEP" if steps else "has no artifacts"
        raise StoreError(f"run {meant.name} {has}")
    return Found(place, meant.name)


def find_all(store: Store, name: str) -> list[Path]:
    """Return the artifact with this name, or all artifacts of the run with this name."""
    meant = meaning(store, name)
    if isinstance(meant, Found):
        return [meant.place]
    if not (places := list(links(store, meant.name).values())):
        raise StoreError(f"run {meant.name} has no artifacts")
    return places


def find_model(store: Store, name: str | None) -> Found:
    """Return the model with this name; None: the chat model of the latest run, else its base model."""
    if name is None and not latest(store):
        raise StoreError(store.lacking("models"))
    found = find(store, LATEST if name is None else name)
    if (kind := read_manifest(found.place)["kind"]) != MODEL:
        raise StoreError(f"{found.place.name} is not a model: its kind is {kind}")
    return found


def describe_model(store: Store, found: Found) -> str:
    """Return a readable description of a model: its step and run or import, folder and date."""
    manifest = read_manifest(found.place)
    when = str(manifest["published"])[:16].replace("T", " ")
    names = [f"import:{name}" for name, place in links(store, IMPORTS).items() if place == found.place]
    what = [f"{manifest['step']} of run {called(found.run or str(manifest['run']))}"]
    return visible(f"{(names if found.run is None and names else what)[0]} ({found.place.name}, {when})")


def meaning(store: Store, name: str) -> Found | Run:
    """Return the artifact or the run with this name."""
    base = store.outputs / "store"
    if name.startswith("import:"):
        return Found(_find_import(store, name.removeprefix("import:")))
    if "/" in name and os.path.isdir(name):  # noqa: PTH112  (pathlib raises for names that are too long)
        real, outputs = Path(name).resolve(), store.outputs.resolve()
        name = real.name if real.parent in (outputs / "store", outputs / "runs", outputs / "refs") else name
    if name and "/" not in name and os.path.exists(base / name / MANIFEST):  # noqa: PTH110
        return Found(base / name)
    if "/" in name.strip("/"):
        return _in_group(store, *name.rsplit("/", 1))
    if name and (direct := _step_or_pin(store, name)) is not None:
        return direct
    if name and (run := _run_called(store, name)) is not None:
        return Run(run)
    found = [folder for folder in list_folder(base) if name and folder[-_ID_CHARS:].startswith(name[:_ID_CHARS])]
    found = [folder for folder in found if str(_manifest(base / folder).get("rid")).startswith(name)]
    if len(found) > 1:
        listed = first_of(found, _MOST_SHOWN)
        raise StoreError(f'"{name}" is ambiguous in {store.outputs}: {listed}. Type more of the id.')
    if not found:
        raise _unknown(store, name)
    return Found(base / found[0])


def _find_import(store: Store, name: str) -> Path:
    """Return the model that was last imported under a name, by the verb or by a pipeline."""
    made = sorted((store.outputs / "store").glob(f"imported-*/{MANIFEST}"), key=lambda path: _published(path.parent))
    named = {path.parent.name.removeprefix("imported-")[: -_ID_CHARS - 1]: path.parent for path in made}
    named |= links(store, IMPORTS)
    if (place := named.get(name) or named.get(clean_label(name))) is not None:
        return place
    text = f"Imports: {', '.join(sorted(named))}." if named else "Nothing was imported yet."
    how = f"To import it: mlxchat import nanochat REPOSITORY --name {name}"
    raise StoreError(f'there is no import "{name}" in {store.outputs}. {text}{suggest(name, named)} {how}')


def _in_group(store: Store, group: str, step: str) -> Found:
    """Return a step of a run, a pin or an import."""
    run = group if group in (PINS, IMPORTS) else _run_called(store, group)
    if run is None:
        raise _unknown(store, f"{group}/{step}", f'there is no run "{group}" with artifacts')
    steps = links(store, run)
    if (place := _step(store, steps, step)) is None:
        has = ", ".join(steps) or "removed artifacts"
        raise StoreError(f'{run} has no "{step}", only {has}.{suggest(step, steps)}')
    return Found(place, None if run in (PINS, IMPORTS) else run)


def _step_or_pin(store: Store, name: str) -> Found | None:
    """Return the step of the latest run, the pin or the step of another run with exactly this name."""
    group = latest(store)
    if (step := _saved(store, links(store, group), name)) is not None:
        return Found(step, group)
    if (pin := links(store, PINS).get(name)) is not None:
        return Found(pin)
    others = [(run, links(store, run)) for run in reversed(runs(store)) if _JOB.search(run) is None]
    finished = next((Found(steps[name], run) for run, steps in others if name in steps), None)
    return finished or next((Found(place, run) for run, steps in others if (place := _step(store, steps, name))), None)


def _step(store: Store, steps: Mapping[str, Path], name: str) -> Path | None:
    """Return a step's artifact; until there is one, the last intermediate model of its training."""
    return _saved(store, steps, name) or _last_saved(steps, name)


def _saved(store: Store, steps: Mapping[str, Path], name: str) -> Path | None:
    """Return a step's artifact, or an intermediate model: of this run, or of the runs that made the step."""
    final = steps.get(name.partition(SAVED)[0]) if SAVED in name else None
    if name in steps or final is None:
        return steps.get(name)
    made = (links(store, str(attempt.get("run"))).get(name) for attempt in _manifest(final).get("attempts", ()))
    return next(filter(None, made), None)


def _last_saved(steps: Mapping[str, Path], step: str = "") -> Path | None:
    """Return the last intermediate model of a step's training, or of any training ("")."""
    made = [place for name, place in steps.items() if SAVED in name and step in ("", name.partition(SAVED)[0])]
    return max(made, key=_published, default=None)


def _run_called(store: Store, name: str) -> str | None:
    """Return the run with this folder name, or the last run called so, preferably one that finished a model."""
    if name == LATEST:
        return latest(store) or None
    known = runs(store, planned=True)
    same = [name] if name in known else [run for run in reversed(known) if called(run) == name]
    return max(same, key=lambda run: _worth(store, run), default=None)


def _unknown(store: Store, name: str, text: str = "") -> StoreError:
    """Return the error for an unknown name, with the existing names and the nearest one."""
    known = {
        "Steps of the latest run": [*links(store, latest(store))],
        "Runs": [*dict.fromkeys(called(run) for run in reversed(runs(store, planned=True)))],
        "Pins": [*links(store, PINS)],
        "Imports": [*links(store, IMPORTS)],
    }
    lines = [f"{what}: {first_of(names, _MOST_SHOWN)}." for what, names in known.items() if names]
    near = suggest(name, [each for names in known.values() for each in names])
    near = near or suggest(name.rpartition("/")[2], list_folder(store.outputs / "store")[:2000])
    text = text or f'"{name}" is no artifact or run'
    return StoreError(f"{text} in {store.outputs}. {' '.join(lines) or store.lacking('artifacts')}{near}")


def latest(store: Store) -> str:
    """Return the name of the latest run, whose refs are `refs/<name>`; "" if there is none.

    That is the last run that finished a model; without one an import or a job, else any run with artifacts.
    """
    link = store.outputs / "refs" / LATEST
    recorded = link.readlink().name if link.is_symlink() else ""
    if model_of(links(store, recorded)) is not None:
        return recorded
    best = max(reversed(runs(store)), key=lambda run: _worth(store, run), default="")
    return best if links(store, best) else ""


def _worth(store: Store, run: str) -> int:
    """Return 2 for a run with a model, 1 with other artifacts, 0 without any."""
    steps = links(store, run)
    return (model_of(steps) is not None) + bool(steps)


def called(run: str) -> str:
    """Return the last part of a run's folder name, such as quickstart."""
    stamp = _STAMP.match(run)
    return (stamp["called"] or run) if stamp else run


def experiment_of(run: str) -> str:
    """Return what a run is called, without the number of a sweep's job: quickstart for …-quickstart-job2."""
    return re.sub(r"-job\d+$", "", called(run))


def links(store: Store, group: str) -> dict[str, Path]:
    """Return name → artifact folder of the refs in a group that lead to a complete artifact."""
    folder = store.outputs / "refs" / group
    found = {}
    for name in list_folder(folder) if group else ():
        with suppress(OSError):
            place = store.outputs / "store" / os.readlink(folder / name).rpartition("/")[2]  # noqa: PTH115  (speed)
            if (place / MANIFEST).exists():
                found[name] = place
    return found


def refs_of(store: Store, group: str = "") -> dict[str, Path]:
    """Return step → resolved artifact folder of a group of refs, as `links`; "": the latest run."""
    return {step: place.resolve() for step, place in links(store, group or latest(store)).items()}


def groups(store: Store) -> list[str]:
    """Return the names of all groups of refs: pins, imports, runs, and groups created by users."""
    folder = store.outputs / "refs"
    return [name for name in list_folder(folder) if not (folder / name).is_symlink()]


def runs(store: Store, *, planned: bool = False) -> list[str]:
    """Return the runs with refs, in order of time; with `planned` also those without artifacts."""
    others = list_folder(store.outputs / "runs") if planned else []
    names = {*groups(store), *others} - {PINS, IMPORTS}
    return sorted(names, key=lambda run: (stamp[1] if (stamp := _STAMP.search(run)) else "", run))


def model_of(steps: Mapping[str, Path]) -> Path | None:
    """Return the chat model among a run's artifacts, else the base model; the newest of a stage."""
    made = []
    for name, place in steps.items():
        manifest = _manifest(place) if SAVED not in name else {}
        if manifest.get("kind") == MODEL:
            stage = manifest["stage"]
            rank = _STAGES.index(stage) if stage in _STAGES else len(_STAGES)
            made.append((-rank, str(manifest.get("published")), place))
    return max(made)[2] if made else None


def running_steps(store: Store) -> list[tuple[str, str]]:
    """Return (run, step) of every step whose lock is held."""
    owners = {
        key: locks.read_owner(lock)
        for key in list_folder(store.outputs / "work")
        if (lock := store.lock(key)).exists() and locks.is_held(lock)
    }
    return [(str(owner.get("run") or key[:_ID_CHARS]), str(owner.get("step"))) for key, owner in owners.items()]


def _published(place: Path) -> str:
    return str(_manifest(place).get("published"))


def _manifest(place: Path) -> Manifest:
    try:
        return read_manifest(place)
    except StoreError:
        return {}
