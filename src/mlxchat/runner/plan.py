"""The plan: each step's key, and whether and why it has to run.

A key is the hash of everything that determines the result: stage, version, settings, the contents of the inputs and the
pins of external data. The store's records map it to an artifact. So an input that is rebuilt with the same contents, or
has the same contents with other settings, reruns nothing downstream (early cutoff). Until an input exists, its key
stands for its contents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import takewhile
from typing import Any

from mlxchat.config.wording import first_of
from mlxchat.errors import ConfigError, StoreError, suggest
from mlxchat.runner.code import changed_code, code_of_stage
from mlxchat.runner.keys import file_hashes, pin_externals
from mlxchat.runner.reasons import Difference, find_difference
from mlxchat.runner.stage import Format, Stage, Stages
from mlxchat.store import attempts, locks
from mlxchat.store.fingerprint import compute_key, identity_of
from mlxchat.store.manifest import Manifest, read_manifest
from mlxchat.store.naming import find, resolve
from mlxchat.store.store import Store, artifact_title

Pipeline = Mapping[str, Mapping[str, Any]]
"""Step → {stage, role: what fills it, with: settings of this step alone}."""
SAVED_CODE = "code.json"
"""In a step's work folder: module → digest when its saved state was begun."""
GIVEN = ("import:", "artifact:")
"""A role may be filled by a model of the store instead of a step: import:NAME is an imported model, artifact:NAME any
model, by any name that `mlxchat show` accepts."""
GIVEN_KIND = "checkpoint"
_MOST_MODULES_SHOWN = 3


def roles_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → name of the step or model that fills it."""
    return {role: str(source) for role, source in entry.items() if role not in ("stage", "with", "executor")}


def steps_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → step, for roles that steps fill."""
    return {role: source for role, source in roles_of(entry).items() if not source.startswith(GIVEN)}


def given_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → import:NAME or artifact:NAME, for roles that models of the store fill."""
    return {role: source for role, source in roles_of(entry).items() if source.startswith(GIVEN)}


def order_steps(pipeline: Pipeline, targets: Iterable[str] | None, stages: Mapping[str, Stage]) -> list[str]:
    """Return the names of the steps that the targets need, in topological order.

    Args:
        pipeline: see `Pipeline`.
        targets: steps, or stages (all steps of that stage); None: every step.
        stages: all known stages.

    Raises:
        ConfigError: names every unknown stage, role, step or target, every unfilled role, every wrong kind, or a cycle.
    """
    problems = _check_wiring(pipeline, stages)
    wanted: list[str] = []
    for target in targets if targets is not None else pipeline:
        if target in pipeline:
            wanted.append(target)
        elif target in stages:
            of_stage = [step for step, entry in pipeline.items() if entry.get("stage") == target]
            wanted += of_stage
            if not of_stage:
                problems.append(f'stage "{target}": the pipeline has no step of this stage')
        else:
            problems.append(
                f'"{target}" is neither a stage nor a step: {", ".join(pipeline)}.{suggest(target, pipeline)}'
            )
    if problems:
        raise ConfigError("\n".join(problems))
    needed: dict[str, list[str]] = {}
    while wanted:
        step = wanted.pop()
        if step not in needed:
            needed[step] = list(steps_of(pipeline[step]).values())
            wanted += needed[step]
    try:
        order = list(TopologicalSorter({step: needed[step] for step in pipeline if step in needed}).static_order())
    except CycleError as error:
        raise ConfigError(f"pipeline has a cycle: {' → '.join(error.args[1])}") from None
    position = {step: number for number, step in enumerate(pipeline)}
    known = sorted(needed, key=position.__getitem__)  # the order in the pipeline, if it is topological
    return known if all(position[made] < position[step] for step in known for made in needed[step]) else order


def _check_wiring(pipeline: Pipeline, stages: Mapping[str, Stage]) -> list[str]:
    problems = []
    for step, entry in pipeline.items():
        name = entry.get("stage", "")
        if name not in stages:
            known = ", ".join(stages)
            hint = suggest(name, stages)
            problems.append(f'pipeline.{step}.stage is "{name}", which is not a stage: {known}.{hint}')
            continue
        stage = stages[name]
        for role in stage.inputs.keys() - entry.keys():
            problems.append(f"pipeline.{step}.{role} is missing: stage {name} needs a {stage.inputs[role]}")
        for role, source in roles_of(entry).items():
            if role not in stage.roles:
                known = ", ".join(stage.roles) or "none"
                hint = suggest(role, stage.roles)
                problems.append(f'pipeline.{step}: "{role}" is not a role of stage {name}: {known}.{hint}')
            elif source.startswith(GIVEN):
                if stage.roles[role] != GIVEN_KIND:
                    problems.append(
                        f"pipeline.{step}.{role} is {source}, a {GIVEN_KIND}; expected a {stage.roles[role]}"
                    )
            elif source not in pipeline:
                problems.append(
                    f'pipeline.{step}.{role} is "{source}", which is not a step of this pipeline: '
                    f"{', '.join(pipeline)}.{_rewire(pipeline, step, role, str(source), stages)}"
                )
            elif pipeline[source].get("stage") in stages:
                kind = stages[pipeline[source]["stage"]].produces
                if kind != stage.roles[role]:
                    problems.append(f"pipeline.{step}.{role} is {source}, a {kind}; expected a {stage.roles[role]}")
    return problems


def _rewire(pipeline: Pipeline, step: str, role: str, source: str, stages: Mapping[str, Stage]) -> str:
    """Return advice about a role whose step is missing: leave this step out, or name a fitting step."""
    kind = stages[pipeline[step]["stage"]].roles[role]
    earlier = takewhile(lambda name: name != step, pipeline)
    fitting = [
        name for name in earlier if (made := stages.get(pipeline[name].get("stage", ""))) and made.produces == kind
    ]
    rewired = f", or rewire it: pipeline.{step}.{role}={fitting[-1]}" if fitting else ""
    return f"{suggest(source, fitting)} Leave {step} out with '~pipeline.{step}'{rewired}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a step has to run, and why."""

    state: str
    """done, run, maybe (an input will be rebuilt; with the same bytes the step is done) or waiting (see make_plan)."""
    reason: str = ""
    """Reason to run; for a finished step, a remark or empty."""
    difference: Difference | None = None
    """Differences from the nearest artifact, if the step has none."""
    drift: list[str] = field(default_factory=list)
    """Modules that have changed since the step's artifact was made."""


@dataclass(kw_only=True)
class PlannedStep:
    """One step, with its key and whether it has to run."""

    name: str
    stage: Stage
    inputs: dict[str, str]
    """Role → step."""
    artifacts: dict[str, Manifest] = field(default_factory=dict)
    """Role → manifest of an artifact that the configuration names."""
    identity: dict[str, Any]
    externals: dict[str, str]
    label: str
    key: str = ""
    """Its identity, without input contents: `identify`."""
    rid: str = ""
    """Id of the artifact with this key; empty: none yet."""
    artifact: str = ""
    """Name of that artifact's folder."""
    forced: bool = False
    """Whether to run it although its artifact exists."""
    code_policy: str = "warn"
    """Effect of changed code: warn, strict (the step runs again) or ignore."""
    config: Any = field(default=None, repr=False)
    """The typed configuration of the step, including its own settings (`with`)."""
    sections: dict[str, Any] = field(default_factory=dict, repr=False)
    """The configuration sections that the stage reads."""
    format: Format | None = None
    """Format of the checkpoint that the step starts from: base or chat; None: unknown, or no checkpoint."""
    unread: frozenset[str] = frozenset()
    """Sections and settings that this step does not read."""
    verdict: Verdict = field(default_factory=lambda: Verdict(state="run"))

    @property
    def state(self) -> str:
        """'done', 'run', 'maybe' or 'waiting'."""
        return self.verdict.state

    @property
    def reason(self) -> str:
        """Reason to run, or a remark."""
        return self.verdict.reason

    @property
    def done(self) -> bool:
        """Whether nothing has to be computed."""
        return self.verdict.state == "done"

    @cached_property
    def code(self) -> dict[str, Any]:
        """Digests of the code that the stage runs, as its manifest records them; computed once."""
        return {"modules": code_of_stage(self.stage.path, self.stage.module, self.stage.root)}

    def key_with(self, contents: Mapping[str, str], iteration: int | None = None) -> str:
        """Return the key of the step with inputs of these contents (role → digest).

        With an iteration, the key of the intermediate model after it, whose manifest has it in `config`.
        """
        identity = self.identity if iteration is None else {**self.identity, "iteration": iteration}
        return compute_key(self.stage.name, self.stage.version, identity, contents, self.externals)

    @property
    def settings_key(self) -> str:
        """An id that is stable over all attempts of a run: a key with names of inputs instead of contents."""
        return self.key_with(self.inputs | {role: manifest["tree"] for role, manifest in self.artifacts.items()})

    @property
    def title(self) -> str:
        """Name of its artifact, without the id."""
        return artifact_title(self.stage.name, self.label)

    def identify(self, store: Store, planned: Mapping[str, PlannedStep]) -> None:
        """Set the step's key from its current inputs, and the artifact with that key.

        For an input that does not exist yet its key stands for its contents; the step's key changes once it exists.

        Args:
            store: store of the inputs.
            planned: name → step; must include its inputs, with keys and judgements.

        Raises:
            StoreError: an existing input has disappeared.
        """
        self.key = self.key_with(self.contents(store, planned))
        self.take(store.made(self.key))

    def contents(self, store: Store, planned: Mapping[str, PlannedStep]) -> dict[str, str]:
        """Return role → digest of the contents of each input, or its key where it will be made; see `identify`."""
        contents = {role: f"key:{planned[source].key}" for role, source in self.inputs.items()}
        return contents | {role: manifest["tree"] for role, manifest in self.inputs_made(store, planned).items()}

    def take(self, made: Manifest | None) -> None:
        """Set the artifact of the key from its record; None: there is none yet."""
        self.rid, self.artifact = (made["rid"], made["name"]) if made is not None else ("", "")

    def inputs_made(self, store: Store, planned: Mapping[str, PlannedStep]) -> dict[str, Manifest]:
        """Return role → manifest of the inputs that exist and will not be rebuilt.

        Raises:
            StoreError: an existing input has disappeared.
        """
        found = dict(self.artifacts)
        for role, source in self.inputs.items():
            if not planned[source].done:
                continue
            made = store.made(planned[source].key)
            if made is None:
                gone = planned[source].artifact or source
                raise StoreError(
                    f"{gone}, which {self.name} needs as {role}, is no longer in {store.outputs}. "
                    "Run the same command again: it makes it."
                )
            found[role] = made
        return found

    def drift(self, manifest: Manifest) -> list[str]:
        """Return the names of modules that have changed since an artifact was made."""
        return changed_code(manifest["code"].get("modules", {}), self.code["modules"])

    def drift_of_saved(self, store: Store) -> list[str]:
        """Return the names of modules that have changed since the step's saved state was begun."""
        work = store.work(self.key)
        if self.code_policy == "ignore" or not (work / "ckpt").is_dir():
            return []
        try:
            return changed_code(json.loads((work / SAVED_CODE).read_bytes()), self.code["modules"])
        except (OSError, ValueError):
            return []  # saved by an earlier version


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
    config_of: Callable[[str, Stage], Any] | None = None,
) -> list[PlannedStep]:
    """Return the steps in topological order, each with its key and whether and why it has to run.

    Args:
        config: typed configuration; a stage's `config` names the sections that it reads.
        pipeline: see `Pipeline`.
        store: store of artifacts.
        targets: steps or stages; None: all.
        seed: the run's seed, part of the key of steps that use it.
        data_seed: the data's seed; None: the same.
        force: steps to run although their artifact exists; "all": every step.
        code: effect of changed code on a finished step: warn, strict (it runs again) or ignore.
        config_of: returns the configuration of a step with its own settings (`with`); None: one for all.
        compute_dtype: dtype of steps that need the GPU; part of their key unless it is float32.

    Raises:
        ConfigError: the pipeline is wired wrongly, or a file of the configuration cannot be read.
    """
    force = [str(name) for name in force]
    unknown = [name for name in force if name not in pipeline and name != "all"]
    if unknown:
        raise ConfigError(f"force: {', '.join(unknown)} is not a step of the pipeline.{suggest(unknown[0], pipeline)}")
    hashes = file_hashes(store.outputs)
    # Computed once for all steps with the same sections.
    identities: dict[int, Any] = {}
    pins: dict[tuple[tuple[int, ...], frozenset[str]], dict[str, str]] = {}
    planned: dict[str, PlannedStep] = {}
    stages = Stages(getattr(config, "stages", ()))
    for name in order_steps(pipeline, targets, stages):
        stage = stages[pipeline[name]["stage"]]
        inputs = steps_of(pipeline[name])
        given = find_given(name, given_of(pipeline[name]), store)
        own = config_of(name, stage) if config_of is not None else config
        sections = {section: getattr(own, section) for section in stage.config}
        for section in sections.values():
            if id(section) not in identities:
                identities[id(section)] = identity_of(section)
        format = _format_of_input(stage, inputs, given, planned, stages)
        unread = frozenset(stage.unread({*inputs, *given}, format))
        read = tuple(map(id, sections.values()))
        if (read, unread) not in pins:
            pins[read, unread] = pin_externals(sections, lambda path: str(hashes.of(str(path.resolve()))), unread)
        identity = _without(unread, {section: identities[id(value)] for section, value in sections.items()})
        identity |= stage.seeds(seed, seed if data_seed is None else data_seed)
        if compute_dtype != "float32" and stage.uses_gpu:
            identity["compute_dtype"] = compute_dtype
        inherited = [planned[step].label for step in inputs.values()]
        labels = [given_label(source, given[role]) for role, source in given_of(pipeline[name]).items()]
        step = PlannedStep(
            name=name, stage=stage, inputs=inputs, artifacts=given, identity=identity,
            externals=pins[read, unread], label=_label(stage, own, [*inherited, *labels]),
            forced=name in force or "all" in force, code_policy=code, config=own, sections=sections,
            format=format, unread=unread,
        )  # fmt: skip
        step.artifacts |= find_artifacts(step, store, planned)
        step.identify(store, planned)
        step.verdict = judge(step, store, forced=step.forced, planned=planned)
        if not step.done and locks.is_held(store.lock(step.key)):
            maker = locks.name_process(locks.read_owner(store.lock(step.key)))
            step.verdict = Verdict(state="waiting", reason=f"{maker} is making it", difference=step.verdict.difference)
        planned[name] = step
    hashes.save()
    return list(planned.values())


def plan_again(plan: Iterable[PlannedStep], store: Store, *, force: Collection[str] = ()) -> list[PlannedStep]:
    """Return a plan updated from the store: keys of steps with new inputs, and finished steps.

    `force` names steps to run although they are done.
    """
    store.forget()
    planned: dict[str, PlannedStep] = {}
    for step in plan:
        planned[step.name] = now = replace(step, forced=step.name in force)
        now.identify(store, planned)
        now.verdict = judge(now, store, forced=now.forced, planned=planned)
    return list(planned.values())


def judge(step: PlannedStep, store: Store, *, forced: bool, planned: Mapping[str, PlannedStep]) -> Verdict:
    """Return whether a step is done, has to run, or may have to, and why; `planned` has its inputs, already judged."""
    if forced:
        return Verdict(state="run", reason="forced")
    pending = {role: source for role, source in step.inputs.items() if not planned[source].done}
    manifest = None if pending else store.made(step.key)
    if manifest is not None:
        drift = [] if step.code_policy == "ignore" else step.drift(manifest)
        changed = first_of(drift, _MOST_MODULES_SHOWN)
        if drift and step.code_policy == "strict":
            return Verdict(state="run", reason=f"code changed: {changed}", drift=drift)
        return Verdict(state="done", reason=f"code drift (warn): {changed}" if drift else "", drift=drift)
    made = step.inputs_made(store, planned)
    difference = find_difference(step, store, {role: manifest["tree"] for role, manifest in made.items()})
    resumable = ", resumes" if attempts.has_saved(store.work(step.key)) else ""
    if resumable and (changed := first_of(step.drift_of_saved(store), _MOST_MODULES_SHOWN)):
        resumable = f", {'starts again' if step.code_policy == 'strict' else 'resumes'}: code changed ({changed})"
    if pending and difference.only_inputs:
        told = ", ".join(f"{role} ({source})" for role, source in pending.items())
        return Verdict(state="maybe", reason=f"input {told} will be rebuilt{resumable}", difference=difference)
    if step.artifacts:
        reason = ", ".join(f"{role} {made['name']}" for role, made in step.artifacts.items())
    else:
        reason = str(difference)
    return Verdict(state="run", reason=reason + resumable, difference=difference)


def find_artifacts(step: PlannedStep, store: Store, planned: Mapping[str, PlannedStep]) -> dict[str, Manifest]:
    """Return role → manifest of the artifacts that set fields with metadata `artifact: role` name.

    In a run that is repeated, or was stopped in or after this very step, the name leads to what the step itself made
    before. Then the artifact is meant from which that was made.

    Raises:
        StoreError: a name is unknown or ambiguous.
    """
    found: dict[str, Manifest] = {}
    queue = list(step.sections.values())
    while queue:
        section = queue.pop(0)
        for item in fields(section) if is_dataclass(section) else ():
            role, name = item.metadata.get("artifact"), getattr(section, item.name)
            if is_dataclass(name):  # including fields of subsections
                queue.append(name)
            if role is None or name is None:
                continue
            place, run = find(store, name)
            found[role] = read_manifest(place)
            before = found[role]["inputs"].get(role)
            if run is not None and before and (first := store.read(before["rid"])) is not None:
                repeated = replace(step, artifacts={**step.artifacts, role: first})
                key = repeated.key_with(repeated.contents(store, planned), found[role]["config"].get("iteration"))
                if key == found[role].get("key"):
                    found[role] = first
    return found


def find_given(step: str, names: Mapping[str, str], store: Store) -> dict[str, Manifest]:
    """Return role → manifest of the models of the store that `names` (role → import:NAME or artifact:NAME) mean.

    Raises:
        ConfigError: there is no such model.
    """
    found = {}
    for role, name in names.items():
        try:
            found[role] = read_manifest(resolve(store, name.removeprefix("artifact:")))
        except StoreError as error:
            raise ConfigError(f"pipeline.{step}.{role}: {error}") from None
        if found[role]["kind"] != GIVEN_KIND:
            raise ConfigError(f"pipeline.{step}.{role}: {found[role]['name']} is a {found[role]['kind']}, no model")
    return found


def given_label(source: str, manifest: Manifest) -> str:
    """Return the label of steps downstream of a given model: the import's name, or the artifact's own label."""
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
) -> Format | None:
    """Return base or chat for the checkpoint that a step of this stage starts from; None: unknown, or no checkpoint."""
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


def _label(stage: Stage, config: Any, inherited: list[str]) -> str:
    if stage.label is None:
        return inherited[0] if inherited else ""
    return str(stage.label(config))


def entries_of(plan: list[PlannedStep]) -> list[dict[str, Any]]:
    """Return a plan's steps as plain data for reports and status, in topological order."""
    return [
        {
            "step": step.name, "stage": step.stage.name, "kind": step.stage.produces, "artifact": step.artifact,
            "key": step.key, "rid": step.rid, "inputs": step.inputs, "state": step.state, "reason": step.reason,
        }
        for step in plan
    ]  # fmt: skip
