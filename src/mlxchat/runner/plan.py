"""The plan: what each step's artifact will be called, and whether and why the step has to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, StoreError, suggest
from mlxchat.runner import locks
from mlxchat.runner.aliases import action_key, find_action
from mlxchat.runner.code_digest import CodeDigests, changed_modules, remembered
from mlxchat.runner.externals import FileHashes
from mlxchat.runner.externals import pin_externals as pin_externals
from mlxchat.runner.fingerprint import compute_rid, identity_of
from mlxchat.runner.naming import find
from mlxchat.runner.pipeline import GIVEN_KIND, given_of, steps_of
from mlxchat.runner.pipeline import Pipeline as Pipeline
from mlxchat.runner.pipeline import order_steps as order_steps
from mlxchat.runner.reasons import Difference, find_difference
from mlxchat.runner.reasons import flatten_config as flatten_config
from mlxchat.runner.stage import Stage, Stages
from mlxchat.runner.store import Manifest, Store, artifact_name, read_manifest

_MOST_MODULES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a step has to run, and why."""

    state: str
    """done, run, maybe (an input will be rebuilt; with the same bytes the step is done) or waiting (see make_plan)."""
    reason: str = ""
    """Why it runs; of a step that is done, a remark or nothing."""
    original: Manifest | None = None
    """The artifact that the step shall share by alias instead of running."""
    difference: Difference | None = None
    """What differs from the nearest artifact, if the step has none."""
    drift: list[str] = field(default_factory=list)
    """Modules that changed since the step's artifact was made."""


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
    forced: bool = False
    """Whether it shall run although its artifact is there."""
    code_policy: str = "warn"
    """What changed code does: warn, strict (the step runs again) or ignore."""
    digests: CodeDigests | None = None
    """Where digests of source files come from."""
    sections: dict[str, Any] = field(default_factory=dict, repr=False)
    """The sections of the configuration that the stage reads."""
    format: str | None = None
    """Of the checkpoint that the step starts from: base or chat; None: unknown, or it has none."""
    unread: frozenset[str] = frozenset()
    """Sections and settings among these that this step does not read."""
    verdict: Verdict = field(default_factory=lambda: Verdict(state="run"))

    @property
    def state(self) -> str:
        """'done', 'run', 'maybe' or 'waiting'."""
        return self.verdict.state

    @property
    def reason(self) -> str:
        """Why it runs, or a remark."""
        return self.verdict.reason

    @property
    def done(self) -> bool:
        """Whether nothing has to be computed."""
        return self.verdict.state == "done"

    @cached_property
    def code(self) -> dict[str, Any]:
        """Digests of the code that the stage runs, as its manifest records them; looked at once."""
        if self.digests is None:
            return {"stage": self.stage.code_digest()}
        return {
            "stage": self.digests.of_file(self.stage.path),
            "modules": self.digests.of_stage(self.stage.path, self.stage.module, self.stage.root),
        }

    def drift(self, manifest: Manifest) -> list[str]:
        """Return the names of the modules that changed since an artifact was made."""
        before = manifest["code"]
        if "modules" in before and "modules" in self.code:
            return changed_modules(before["modules"], self.code["modules"])
        return [f"stages/{self.stage.path.name}"] if before.get("stage") != self.code["stage"] else []


def make_plan(
    config: Any,
    pipeline: Pipeline,
    store: Store,
    *,
    targets: Iterable[str] | None,
    seed: int,
    data_seed: int | None = None,
    force: Iterable[str],
    code: str = "warn",
    compute_dtype: str = "float32",
) -> list[PlannedStep]:
    """Return the steps in order, each with its artifact's id and whether and why it has to run.

    Args:
        config: typed configuration; a stage's CONFIG names the attributes that it reads.
        pipeline: step → {stage, role: step}.
        store: where artifacts are looked up.
        targets: steps or stages; None: all.
        seed: the run's seed, part of the identity of what draws from it.
        data_seed: the data's; None: the same.
        force: steps to run although their artifact is there; "all" for every one.
        code: what changed code does to a step that is done: warn, strict (it runs again) or ignore.
        compute_dtype: in which steps that need the GPU compute; part of their identity unless it is float32.

    Raises:
        ConfigError: the pipeline is wired wrongly, or a file that the config names cannot be read.
    """
    force = list(force)
    unknown = [name for name in force if name not in pipeline and name != "all"]
    if unknown:
        raise ConfigError(f"force names {', '.join(unknown)}, no step of the pipeline.{suggest(unknown[0], pipeline)}")
    digests = CodeDigests(remembered(), Path(__file__).parents[1])
    hashes = FileHashes(store.outputs / "index" / "files.json")
    # Steps share sections, and need each of them once.
    identities: dict[str, Any] = {}
    pins: dict[tuple[tuple[str, ...], frozenset[str]], dict[str, str]] = {}
    planned: dict[str, PlannedStep] = {}
    stages = Stages(getattr(config, "stages", ()))
    for name in order_steps(pipeline, targets, stages):
        stage = stages[pipeline[name]["stage"]]
        inputs = steps_of(pipeline[name])
        given = find_given(name, given_of(pipeline[name]), store)
        sections = {section: getattr(config, section) for section in stage.config}
        for section in sections.keys() - identities.keys():
            identities[section] = identity_of(sections[section])
        format = _format_of_input(stage, inputs, given, planned, stages)
        unread = stage.unread({*inputs, *given}, format)
        if (stage.config, unread) not in pins:
            pins[stage.config, unread] = pin_externals(sections, hashes.of, unread)
        identity = _without(unread, {section: identities[section] for section in sections})
        identity |= stage.seeds(seed, seed if data_seed is None else data_seed)
        if compute_dtype != "float32" and "gpu" in stage.resources:
            identity["compute_dtype"] = compute_dtype
        externals = pins[stage.config, unread]
        rids = {role: planned[step].rid for role, step in inputs.items()}
        rids |= {role: manifest["rid"] for role, manifest in given.items()}
        rid_with = partial(_rid_with, stage, identity, externals, rids)
        artifacts = find_artifacts(sections, store, rid_with)
        rid = rid_with(artifacts)
        inherited = [planned[step].label for step in inputs.values()]
        labels = [given_label(source, given[role]) for role, source in given_of(pipeline[name]).items()]
        label = _label(stage, config, [*inherited, *labels])
        artifacts |= given
        step = PlannedStep(
            name=name, stage=stage, inputs=inputs, artifacts=artifacts, identity=identity, externals=externals, rid=rid,
            artifact=artifact_name(stage.name, label, rid), label=label, forced=name in force or "all" in force,
            code_policy=code, digests=digests, sections=sections, format=format, unread=unread,
        )  # fmt: skip
        step.verdict = judge(step, store, forced=step.forced, planned=planned)
        place = store.own_folder(rid) if step.done else None
        if place is not None:
            step.artifact = place.name  # made under another label
        elif not step.done and locks.is_held(store.lock(rid)):
            step.verdict = Verdict(state="waiting", reason=_tell_maker(store, rid), difference=step.verdict.difference)
        planned[name] = step
    digests.save()
    hashes.save()
    return list(planned.values())


def judge(step: PlannedStep, store: Store, *, forced: bool, planned: Mapping[str, PlannedStep]) -> Verdict:
    """Return whether a step is done, has to run, or may have to, and why.

    Args:
        step: the step.
        store: where artifacts are looked up.
        forced: whether it runs although its artifact is there.
        planned: name → step, of its inputs at least, which are judged before: those that are done have their artifact.
    """
    if forced:
        return Verdict(state="run", reason="forced")
    pending = {role: source for role, source in step.inputs.items() if not planned[source].done}
    trees = {role: made["tree"] for role, made in _inputs_made(step, store, planned, pending).items()}
    manifest = store.read(step.rid)
    if manifest is not None:
        changed = [
            f"{role} ({step.inputs.get(role) or step.artifacts[role]['name']})"
            for role, tree in trees.items()
            if tree != manifest["inputs"][role]["tree"]
        ]
        if changed and manifest.get("alias_of") is None:
            return Verdict(state="run", reason=f"input changed: {', '.join(changed)}")
        if not changed:
            drift = [] if step.code_policy == "ignore" else step.drift(manifest)
            if drift and step.code_policy == "strict":
                return Verdict(state="run", reason=f"code changed: {_list(drift)}", drift=drift)
            if pending:
                return Verdict(state="maybe", reason=_tell_pending(pending), drift=drift)
            return Verdict(state="done", reason=f"code drift (warn): {_list(drift)}" if drift else "", drift=drift)
    original = None if pending else find_action(store, action_key(step, trees), step.stage.name)
    if original is not None and not (step.code_policy == "strict" and step.drift(original)):
        return Verdict(state="done", reason=f"same inputs as {original['name']}", original=original)
    rids = {role: planned[source].rid for role, source in step.inputs.items()}
    rids |= {role: made["rid"] for role, made in step.artifacts.items()}
    difference = find_difference(step, store, rids)
    resumable = ", resumes" if (store.work(step.rid) / "ckpt").is_dir() else ""
    if pending and difference.only_inputs:
        return Verdict(state="maybe", reason=_tell_pending(pending) + resumable, difference=difference)
    if step.artifacts:
        reason = ", ".join(f"{role} {made['name']}" for role, made in step.artifacts.items())
    else:
        reason = str(difference)
    return Verdict(state="run", reason=reason + resumable, difference=difference)


def _inputs_made(
    step: PlannedStep, store: Store, planned: Mapping[str, PlannedStep], pending: Mapping[str, str]
) -> dict[str, Manifest]:
    """Return role → manifest of the inputs that are there and will not be rebuilt."""
    found = dict(step.artifacts)
    for role, source in step.inputs.items():
        if role not in pending:
            # A step that shares another one's artifact may not have its alias yet.
            made = store.read(planned[source].rid) or planned[source].verdict.original
            if made is None:
                raise StoreError(
                    f"{planned[source].artifact}, which {step.name} needs as {role}, is no longer in {store.outputs}. "
                    "Run the same command again: it is made anew."
                )
            found[role] = made
    return found


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_MODULES_SHOWN} more" if len(names) > _MOST_MODULES_SHOWN else ""
    return ", ".join(names[:_MOST_MODULES_SHOWN]) + more


def _tell_pending(pending: Mapping[str, str]) -> str:
    return f"input {', '.join(f'{role} ({source})' for role, source in pending.items())} will be rebuilt"


def _tell_maker(store: Store, rid: str) -> str:
    owner = locks.read_owner(store.lock(rid))
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')} is making it"


def find_artifacts(
    sections: Mapping[str, Any], store: Store, rid_with: Callable[[Mapping[str, Manifest]], str]
) -> dict[str, Manifest]:
    """Return role → manifest of the artifacts that fields with metadata `artifact: role` name, where they are set.

    A step of a run may be what this very step made before: a run that was stopped afterwards, or is repeated, means
    the artifact that stood there first, which is the one it was made from.

    Args:
        sections: of the configuration.
        store: where names are looked up.
        rid_with: id of the step if it takes these artifacts.

    Raises:
        StoreError: a name leads to nothing, or to more than one thing.
    """
    found: dict[str, Manifest] = {}
    queue = list(sections.values())
    while queue:
        section = queue.pop(0)
        for item in fields(section) if is_dataclass(section) else ():
            role, name = item.metadata.get("artifact"), getattr(section, item.name)
            if is_dataclass(name):  # fields of a part of the section count too
                queue.append(name)
            if role is None or name is None:
                continue
            place, run = find(store, name)
            found[role] = read_manifest(place)
            before = found[role]["inputs"].get(role)
            first = store.read(before["rid"]) if before and run is not None else None
            if first and rid_with({role: first}) == found[role]["rid"]:
                found[role] = first
    return found


def find_given(step: str, names: Mapping[str, str], store: Store) -> dict[str, Manifest]:
    """Return role → manifest of the models of the store that fill a step's roles.

    Args:
        step: its name, for messages.
        names: role → import:NAME or artifact:NAME.
        store: where they are.

    Raises:
        ConfigError: there is none of such a name.
    """
    found = {}
    for role, name in names.items():
        try:
            found[role] = read_manifest(store.resolve(name.removeprefix("artifact:")))
        except StoreError as error:
            raise ConfigError(f"pipeline.{step}.{role}: {error}") from None
        if found[role]["kind"] != GIVEN_KIND:
            raise ConfigError(f"pipeline.{step}.{role}: {found[role]['name']} is a {found[role]['kind']}, no model")
    return found


def given_label(source: str, manifest: Manifest) -> str:
    """Return what steps below a given model are called after: the name of an import, or the artifact's own label."""
    kind, _, name = source.partition(":")
    if kind == "import":
        return name
    return str(manifest["name"]).removeprefix(f"{manifest['stage']}-")[: -len(manifest["rid"][:16]) - 1]


def _format_of_input(
    stage: Stage,
    inputs: Mapping[str, str],
    given: Mapping[str, Manifest],
    planned: Mapping[str, PlannedStep],
    stages: Mapping[str, Stage],
) -> str | None:
    """Return base or chat for the checkpoint that a step of this stage starts from; None: unknown, or it has none."""
    role = next((role for role, kind in stage.roles.items() if kind == GIVEN_KIND), "")
    if role in inputs:
        return planned[inputs[role]].stage.format
    made = stages.get(given[role]["stage"]) if role in given else None
    return made.format if made is not None else None


def _without(unread: frozenset[str], identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity without some sections and settings."""
    kept = {section: dict(value) for section, value in identity.items() if section not in unread}
    for path in unread:
        section, _, setting = path.partition(".")
        kept.get(section, {}).pop(setting, None)
    return kept


def _rid_with(
    stage: Stage, identity: Any, externals: Mapping[str, str], rids: Mapping[str, str], named: Mapping[str, Manifest]
) -> str:
    further = {role: manifest["rid"] for role, manifest in named.items()}
    return compute_rid(stage.name, stage.version, identity, {**rids, **further}, externals)


def _label(stage: Stage, config: Any, inherited: list[str]) -> str:
    if stage.label is None:
        return inherited[0] if inherited else ""
    value = config
    for part in stage.label.split("."):
        value = getattr(value, part)
    return str(value)


def entries_of(plan: list[PlannedStep]) -> list[dict[str, Any]]:
    """Return what is written of a plan's steps for reports and status: plain data, inputs first."""
    return [
        {
            "step": step.name,
            "stage": step.stage.name,
            "kind": step.stage.produces,
            "artifact": step.artifact,
            "rid": step.rid,
            "inputs": step.inputs,
            "state": step.state,
            "reason": step.reason,
        }
        for step in plan
    ]
