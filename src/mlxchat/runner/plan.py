"""The plan: which steps there are, in which order, what each one's artifact will be called, and what must run why."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, suggest
from mlxchat.runner.fingerprint import compute_rid, hash_file, identity_of
from mlxchat.runner.stage import Stage, read_stage, stage_names
from mlxchat.runner.store import Manifest, Store, artifact_name, read_manifest

Pipeline = Mapping[str, Mapping[str, str]]
_MOST_CHANGES_SHOWN = 3


@dataclass(kw_only=True)
class PlannedStep:
    """One step, with its identity and whether it has to run."""

    name: str
    stage: Stage
    inputs: dict[str, str]
    """Role → step."""
    artifacts: dict[str, Manifest] = field(default_factory=dict)
    """Role → manifest of an artifact that the configuration names, instead of a step."""
    identity: dict[str, Any]
    externals: dict[str, str]
    rid: str
    artifact: str
    """Name of the artifact's folder."""
    label: str
    done: bool
    reason: str

    @property
    def state(self) -> str:
        """'done' or 'run'."""
        return "done" if self.done else "run"


def order_steps(pipeline: Pipeline, targets: Iterable[str] | None) -> list[str]:
    """Return the names of the steps that the targets need, inputs first.

    Args:
        pipeline: step → {stage, role: step}.
        targets: steps, or stages (all steps of that stage); None: every step.

    Raises:
        ConfigError: naming every unknown stage, role, step or target, every unfilled role, every kind that does not
            fit, or a cycle.
    """
    problems = _check_wiring(pipeline)
    wanted: list[str] = []
    for target in targets if targets is not None else pipeline:
        if target in pipeline:
            wanted.append(target)
        elif target in stage_names():
            of_stage = [step for step, entry in pipeline.items() if entry.get("stage") == target]
            wanted += of_stage
            if not of_stage:
                problems.append(f'target "{target}": the pipeline has no step of this stage')
        else:
            problems.append(f'target "{target}" is no step: {", ".join(pipeline)}.{suggest(target, pipeline)}')
    if problems:
        raise ConfigError("\n".join(problems))
    order: list[str] = []
    trail: list[str] = []

    def visit(step: str) -> None:
        if step in order:
            return
        if step in trail:
            raise ConfigError(f"pipeline has a cycle: {' → '.join([*trail[trail.index(step) :], step])}")
        trail.append(step)
        for role, source in pipeline[step].items():
            if role != "stage":
                visit(source)
        trail.pop()
        order.append(step)

    for step in wanted:
        visit(step)
    return [step for step in pipeline if step in order] if _is_sorted(pipeline, order) else order


def make_plan(
    config: Any, pipeline: Pipeline, store: Store, *, targets: Iterable[str] | None, seed: int, force: Iterable[str]
) -> list[PlannedStep]:
    """Return the steps in order, each with its artifact's id and whether and why it has to run.

    Args:
        config: typed configuration; a stage's CONFIG names the attributes that it reads.
        pipeline: step → {stage, role: step}.
        store: where artifacts are looked up.
        targets: steps or stages; None: all.
        seed: the run's seed, part of every identity.
        force: steps to run although their artifact is there; "all" for every one.

    Raises:
        ConfigError: the pipeline is wired wrongly, or a file that the config names cannot be read.
    """
    force = list(force)
    unknown = [name for name in force if name not in pipeline and name != "all"]
    if unknown:
        raise ConfigError(f"force names {', '.join(unknown)}, no step of the pipeline.{suggest(unknown[0], pipeline)}")
    planned: dict[str, PlannedStep] = {}
    for name in order_steps(pipeline, targets):
        stage = read_stage(pipeline[name]["stage"])
        inputs = {role: step for role, step in pipeline[name].items() if role != "stage"}
        sections = {section: getattr(config, section) for section in stage.config}
        identity = {"seed": seed, **{section: identity_of(value) for section, value in sections.items()}}
        externals = pin_externals(sections)
        rids = {role: planned[step].rid for role, step in inputs.items()}
        rid_with = partial(_rid_with, stage, identity, externals, rids)
        artifacts = find_artifacts(sections, store, rid_with)
        rid = rid_with(artifacts)
        label = _label(stage, config, [planned[step].label for step in inputs.values()])
        step = PlannedStep(
            name=name, stage=stage, inputs=inputs, artifacts=artifacts, identity=identity, externals=externals, rid=rid,
            artifact=artifact_name(stage.name, label, rid), label=label, done=False, reason="",
        )  # fmt: skip
        forced = name in force or "all" in force
        step.done, step.reason = judge(step, store, forced=forced, planned=planned)
        place = store.find(rid) if step.done else None
        if place is not None:
            step.artifact = place.name  # made under another label
        planned[name] = step
    return list(planned.values())


def judge(step: PlannedStep, store: Store, *, forced: bool, planned: Mapping[str, PlannedStep]) -> tuple[bool, str]:
    """Return whether a step is done, and the reason to run it or a remark."""
    if forced:
        return False, "forced"
    manifest = store.read(step.rid)
    if manifest is not None:
        changed = [
            f"{role} ({source})"
            for role, source in step.inputs.items()
            if (made := store.read(planned[source].rid)) and made["tree"] != manifest["inputs"][role]["tree"]
        ]
        changed += [
            f"{role} ({made['name']})"
            for role, made in step.artifacts.items()
            if made["tree"] != manifest["inputs"][role]["tree"]
        ]
        if changed:
            return False, f"input changed: {', '.join(changed)}"
        drifted = manifest["code"].get("stage") != step.stage.code_digest()
        return True, "code drift (warn)" if drifted else ""
    resumable = ", resumes" if (store.work(step.rid) / "ckpt").is_dir() else ""
    if step.artifacts:
        return False, ", ".join(f"{role} {made['name']}" for role, made in step.artifacts.items()) + resumable
    nearest = _nearest(step, store)
    return False, (_explain(step, nearest, planned) if nearest else "missing") + resumable


def pin_externals(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return name → content hash or version of everything outside the store that the config refers to.

    Fields whose metadata says `external: file` hold paths, those with `external: package` names of packages.

    Raises:
        ConfigError: listing every file that cannot be read and every package that is not installed.
    """
    pins: dict[str, str] = {}
    problems: list[str] = []

    def visit(where: str, value: Any) -> None:
        if is_dataclass(value):
            for field in fields(value):
                item, kind = getattr(value, field.name), field.metadata.get("external")
                if kind is None:
                    visit(f"{where}.{field.name}", item)
                    continue
                for name in [item] if isinstance(item, str) else item or []:
                    try:
                        if kind == "file":
                            pins[f"file {len(pins)} {Path(name).name}"] = hash_file(Path(name))
                        else:
                            pins[f"package {name}"] = importlib.metadata.version(name)
                    except OSError as error:
                        problems.append(f"{where}.{field.name}: {name} cannot be read ({error.strerror})")
                    except importlib.metadata.PackageNotFoundError:
                        problems.append(f"{where}.{field.name}: package {name} is missing: pip install {name}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{where}.{key}", item)

    for section, value in sections.items():
        visit(section, value)
    if problems:
        raise ConfigError("\n".join(problems))
    return pins


def find_artifacts(
    sections: Mapping[str, Any], store: Store, rid_with: Callable[[Mapping[str, Manifest]], str]
) -> dict[str, Manifest]:
    """Return role → manifest of the artifacts that fields with metadata `artifact: role` name, where they are set.

    What is named by a step of the latest run may be what this very step made before: a run that was stopped
    afterwards, or is repeated, means the artifact that stood there first, which is the one it was made from.

    Args:
        sections: of the configuration.
        store: where names are looked up.
        rid_with: id of the step if it takes these artifacts.

    Raises:
        StoreError: a name leads to nothing, or to more than one thing.
    """
    found: dict[str, Manifest] = {}
    for section in sections.values():
        for item in fields(section) if is_dataclass(section) else ():
            role, name = item.metadata.get("artifact"), getattr(section, item.name)
            if role is None or name is None:
                continue
            found[role] = read_manifest(store.resolve(name))
            before = found[role]["inputs"].get(role)
            first = store.read(before["rid"]) if before and name in store.refs() else None
            if first and rid_with({role: first}) == found[role]["rid"]:
                found[role] = first
    return found


def flatten_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return plain nested data as dotted key → value."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten_config(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _rid_with(
    stage: Stage, identity: Any, externals: Mapping[str, str], rids: Mapping[str, str], named: Mapping[str, Manifest]
) -> str:
    further = {role: manifest["rid"] for role, manifest in named.items()}
    return compute_rid(stage.name, stage.version, identity, {**rids, **further}, externals)


def _check_wiring(pipeline: Pipeline) -> list[str]:
    problems = []
    for step, entry in pipeline.items():
        name = entry.get("stage")
        if name not in stage_names():
            known = ", ".join(stage_names())
            hint = suggest(str(name), stage_names())
            problems.append(f'pipeline.{step}.stage is "{name}", which is no stage: {known}.{hint}')
            continue
        stage = read_stage(name)
        for role in stage.inputs.keys() - entry.keys():
            problems.append(f"pipeline.{step}.{role} is missing: stage {name} needs a {stage.inputs[role]}")
        for role, source in entry.items():
            if role == "stage":
                continue
            if role not in stage.roles:
                known = ", ".join(stage.roles) or "none"
                hint = suggest(role, stage.roles)
                problems.append(f'pipeline.{step}: "{role}" is no role of stage {name}: {known}.{hint}')
            elif source not in pipeline:
                problems.append(
                    f'pipeline.{step}.{role} is "{source}", which is no step of this pipeline: '
                    f"{', '.join(pipeline)}.{suggest(str(source), pipeline)}"
                )
            elif pipeline[source].get("stage") in stage_names():
                kind = read_stage(pipeline[source]["stage"]).produces
                if kind != stage.roles[role]:
                    problems.append(f"pipeline.{step}.{role} is {source}, a {kind}; expected a {stage.roles[role]}")
    return problems


def _is_sorted(pipeline: Pipeline, steps: list[str]) -> bool:
    """Tell whether the pipeline's own order already puts inputs first: then it is the order that people know."""
    position = {step: index for index, step in enumerate(pipeline)}
    return all(
        position[source] < position[step]
        for step in steps
        for role, source in pipeline[step].items()
        if role != "stage"
    )


def _label(stage: Stage, config: Any, inherited: list[str]) -> str:
    if stage.label is None:
        return inherited[0] if inherited else ""
    value = config
    for part in stage.label.split("."):
        value = getattr(value, part)
    return str(value)


def _nearest(step: PlannedStep, store: Store) -> Manifest | None:
    """Return the artifact of the same step that differs in the fewest config keys, the newest among equals."""
    flat = flatten_config(step.identity)
    best: tuple[int, str, Manifest] | None = None
    for manifest in store.manifests():
        if manifest["stage"] != step.stage.name or manifest["step"] != step.name:
            continue
        other = flatten_config(manifest["config"])
        distance = sum(flat.get(key) != other.get(key) for key in flat.keys() | other.keys())
        # Fewer differences first, then later: compare (−distance, time).
        if best is None or (-distance, manifest["published"]) > (-best[0], best[1]):
            best = (distance, manifest["published"], manifest)
    return best[2] if best else None


def _explain(step: PlannedStep, nearest: Manifest, planned: Mapping[str, PlannedStep]) -> str:
    """Return what differs between a step and its nearest artifact."""
    if nearest["version"] != step.stage.version:
        return f"stage changed: version {nearest['version']} → {step.stage.version}"
    now, before = flatten_config(step.identity), flatten_config(nearest["config"])
    changes = [
        f"{key} {_show(before.get(key, 'absent'))} → {_show(now.get(key, 'absent'))}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]
    if changes:
        more = f" and {len(changes) - _MOST_CHANGES_SHOWN} more" if len(changes) > _MOST_CHANGES_SHOWN else ""
        return f"config changed: {', '.join(changes[:_MOST_CHANGES_SHOWN])}{more}"
    inputs = [
        f"{role} ({source})"
        for role, source in step.inputs.items()
        if nearest["inputs"].get(role, {}).get("rid") != planned[source].rid
    ]
    if inputs:
        return f"input changed: {', '.join(inputs)}"
    return "external data changed" if nearest.get("pins", {}) != step.externals else "missing"


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
