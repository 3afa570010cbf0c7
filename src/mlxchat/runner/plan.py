"""The plan: each step's key, and whether and why it has to run.

A key is the hash of everything that determines the result: stage, version, settings, the contents of the inputs and the
pins of external data. The store's records map it to an artifact. So an input that is rebuilt with the same contents, or
has the same contents with other settings, reruns nothing downstream (early cutoff). Until an input exists, its key
stands for its contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from typing import Any

from mlxchat.config.wording import first_of, format_bytes, format_seconds, plural, wrapped
from mlxchat.errors import ConfigError, StoreError, suggest
from mlxchat.runner.keys import changed_names, code_of_stage, pin_externals
from mlxchat.runner.stage import Format, Stage, Stages
from mlxchat.store import locks
from mlxchat.store.fingerprint import changes, compute_key, flatten, hash_file, identity_of
from mlxchat.store.manifest import Manifest, read_manifest
from mlxchat.store.naming import find, resolve
from mlxchat.store.store import Store, artifact_title

Pipeline = Mapping[str, Mapping[str, Any]]
"""Step → {stage, role: what fills it, with: settings of this step alone, executor}."""
GIVEN = ("import:", "artifact:")
"""A role may be filled by a model of the store instead of a step: import:NAME is an imported model, artifact:NAME any
model, by any name that `mlxchat show` accepts."""
_MODEL = "checkpoint"
_MOST_MODULES_SHOWN = 3


def roles_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → name of the step or model that fills it."""
    return {role: str(source) for role, source in entry.items() if role not in ("stage", "with", "executor")}


def steps_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return role → step, for roles that steps fill."""
    return {role: source for role, source in roles_of(entry).items() if not source.startswith(GIVEN)}


def order_steps(pipeline: Pipeline, targets: Iterable[str] | None, stages: Mapping[str, Stage]) -> list[str]:
    """Return the steps that the targets need (steps, or stages: all their steps; None: all), in topological order."""
    problems = list(_check_wiring(pipeline, stages))
    wanted: set[str] = set()
    for target in targets if targets is not None else pipeline:
        of_stage = [step for step, entry in pipeline.items() if entry.get("stage") == target]
        wanted |= {target} if target in pipeline else set(of_stage)
        if target not in pipeline and target in stages and not of_stage:
            problems.append(f'stage "{target}": the pipeline has no step of this stage')
        elif target not in pipeline and target not in stages:
            near = suggest(target, pipeline)
            problems.append(f'"{target}" is neither a stage nor a step: {", ".join(pipeline)}.{near}')
    if problems:
        raise ConfigError("\n".join(problems))
    order: list[str] = []

    def visit(step: str, path: tuple[str, ...]) -> None:
        if step in path:
            raise ConfigError(f"pipeline has a cycle: {' → '.join([*path[path.index(step) :], step])}")
        if step not in order:
            for source in steps_of(pipeline[step]).values():
                visit(source, (*path, step))
            order.append(step)

    for step in pipeline:
        if step in wanted:
            visit(step, ())
    return order


def _check_wiring(pipeline: Pipeline, stages: Mapping[str, Stage]) -> Iterator[str]:
    of_steps = {step: stages.get(entry.get("stage", "")) for step, entry in pipeline.items()}
    kinds = {step: stage.produces for step, stage in of_steps.items() if stage is not None}
    for step, entry in pipeline.items():
        name, stage = entry.get("stage", ""), of_steps[step]
        if stage is None:
            known, near = ", ".join(stages), suggest(name, stages)
            yield f'pipeline.{step}.stage is "{name}", which is not a stage: {known}.{near}'
            continue
        for role in stage.inputs.keys() - entry.keys():
            yield f"pipeline.{step}.{role} is missing: stage {name} needs a {stage.inputs[role]}"
        for role, source in roles_of(entry).items():
            kind, where = stage.roles.get(role), f"pipeline.{step}.{role}"
            if kind is None:
                known, near = ", ".join(stage.roles) or "none", suggest(role, stage.roles)
                yield f'pipeline.{step}: "{role}" is not a role of stage {name}: {known}.{near}'
            elif source not in pipeline and not source.startswith(GIVEN):
                earlier = list(pipeline)[: list(pipeline).index(step)]
                fitting = [each for each in earlier if kinds.get(each) == kind]
                rewire = f", or rewire it: {where}={fitting[-1]}" if fitting else ""
                yield (
                    f'{where} is "{source}", which is not a step of this pipeline: {", ".join(pipeline)}.'
                    f"{suggest(source, fitting)} Leave {step} out with '~pipeline.{step}'{rewire}"
                )
            else:
                found = _MODEL if source.startswith(GIVEN) else kinds.get(source, kind)
                if found != kind:
                    yield f"{where} is {source}, a {found}; expected a {kind}"


@dataclass(kw_only=True)
class PlannedStep:
    """One step, with its key and whether and why it has to run."""

    name: str
    stage: Stage
    inputs: dict[str, str]  # role → step
    artifacts: dict[str, Manifest]  # role → an artifact that the configuration names
    identity: dict[str, Any]
    externals: dict[str, str]  # pins of external data
    label: str
    forced: bool = False  # whether to run it although its artifact exists
    config: Any = field(repr=False)  # with its own settings (`with`)
    sections: dict[str, Any] = field(repr=False)  # the sections of `config` that the stage reads
    format: Format | None = None  # of the checkpoint that the step starts from; None: unknown, or no checkpoint
    unread: frozenset[str] = frozenset()  # sections and settings that this step does not read
    # What `judge` found:
    key: str = ""
    rid: str = ""  # id of the artifact with this key; empty: none yet
    artifact: str = ""  # name of that artifact's folder
    state: str = "run"  # or done, maybe (an input will be rebuilt) or waiting (for another process)
    reason: str = ""  # for a finished step, a remark or empty
    difference: Difference | None = None  # from the nearest artifact, if the step has none
    drift: list[str] = field(default_factory=list)  # modules that have changed since the artifact was made

    @property
    def done(self) -> bool:
        """Whether nothing has to be computed."""
        return self.state == "done"

    @cached_property
    def code(self) -> dict[str, Any]:
        """Digests of the code that the stage runs, as its manifest records them; computed once."""
        return {"modules": code_of_stage(self.stage.path, self.stage.module, self.stage.root)}

    def key_with(self, contents: Mapping[str, str], iteration: int | None = None) -> str:
        """Return the key with inputs of these contents (role → digest), or that of the model after an iteration."""
        identity = self.identity if iteration is None else {**self.identity, "iteration": iteration}
        return compute_key(self.stage.name, self.stage.version, identity, contents, self.externals)

    @property
    def title(self) -> str:
        """Name of its artifact, without the id."""
        return artifact_title(self.stage.name, self.label)

    def contents(self, store: Store, planned: Mapping[str, PlannedStep]) -> dict[str, str]:
        """Return role → digest of the contents of each input, or its key where it will be made."""
        contents = {role: f"key:{planned[source].key}" for role, source in self.inputs.items()}
        return contents | {role: manifest["tree"] for role, manifest in self.inputs_made(store, planned).items()}

    def inputs_made(self, store: Store, planned: Mapping[str, PlannedStep]) -> dict[str, Manifest]:
        """Return role → manifest of the inputs that exist and will not be rebuilt."""
        found = dict(self.artifacts)
        for role, source in self.inputs.items():
            if not planned[source].done:
                continue
            made = store.made(planned[source].key)
            if made is None:
                gone = f"{planned[source].artifact or source}, which {self.name} needs as {role}"
                raise StoreError(f"{gone}, is no longer in {store.outputs}. Run the same command again: it makes it.")
            found[role] = made
        return found

    def judge(self, store: Store, planned: Mapping[str, PlannedStep], *, forced: bool) -> None:
        """Set key, artifact, state and reason from the store and the inputs, which must have been judged.

        For an input that does not exist yet its key stands for its contents; the step's key changes once it exists.
        """
        self.key = self.key_with(self.contents(store, planned))
        made = store.made(self.key)
        self.take(made)
        self.state, self.difference, self.drift = "run", None, []
        pending = {role: source for role, source in self.inputs.items() if not planned[source].done}
        if forced:
            self.reason = "forced"
        elif made is not None and not pending:
            self.drift = changed_names(made["code"].get("modules", {}), self.code["modules"])
            changed = first_of(self.drift, _MOST_MODULES_SHOWN)
            self.state, self.reason = "done", f"code drift: {changed}" if changed else ""
        else:
            trees = {role: manifest["tree"] for role, manifest in self.inputs_made(store, planned).items()}
            self.difference = find_difference(self, store, trees)
            resumes = ", resumes" if locks.has_saved(store.work(self.key)) else ""
            differs = self.difference.version or self.difference.config or self.difference.externals
            if pending and self.difference.nearest is not None and not differs:
                told = ", ".join(f"{role} ({source})" for role, source in pending.items())
                self.state, self.reason = "maybe", f"input {told} will be rebuilt{resumes}"
            else:
                named = ", ".join(f"{role} {made['name']}" for role, made in self.artifacts.items())
                self.reason = f"{named or self.difference}{resumes}"

    def take(self, made: Manifest | None) -> None:
        """Set the artifact of the key from its record; None: there is none yet."""
        self.rid, self.artifact = (made["rid"], made["name"]) if made is not None else ("", "")


def make_plan(
    config: Any,
    store: Store,
    *,
    compute_dtype: str = "float32",
    config_of: Callable[[Any, str, Stage], Any] = lambda config, step, stage: config,
) -> list[PlannedStep]:
    """Return the steps in topological order, each with its key and whether and why it has to run.

    Args:
        config: typed configuration, with the sections that the stages read.
        store: store of artifacts.
        compute_dtype: dtype of steps that need the GPU; part of their key unless it is float32.
        config_of: returns the configuration of a step with its own settings (`with`).
    """
    pipeline, stages = config.pipeline, Stages(config.stages)
    force = [str(name) for name in config.force]
    if unknown := [name for name in force if name not in pipeline and name != "all"]:
        raise ConfigError(f"force: {', '.join(unknown)} is not a step of the pipeline.{suggest(unknown[0], pipeline)}")
    hash_once = cache(hash_file)  # large texts, of several steps
    identities: dict[int, Any] = {}  # of a section, by its Python id: several steps share one
    pins: dict[tuple[tuple[int, ...], frozenset[str]], dict[str, str]] = {}
    planned: dict[str, PlannedStep] = {}
    for name in order_steps(pipeline, config.targets, stages):
        stage, inputs = stages[pipeline[name]["stage"]], steps_of(pipeline[name])
        given = {role: source for role, source in roles_of(pipeline[name]).items() if role not in inputs}
        artifacts = {role: _find_given(f"pipeline.{name}.{role}", source, store) for role, source in given.items()}
        own = config_of(config, name, stage)
        sections = {section: getattr(own, section) for section in stage.config}
        for section in sections.values():
            if id(section) not in identities:
                identities[id(section)] = identity_of(section)
        base = next((role for role, kind in stage.roles.items() if kind == _MODEL), "")  # the checkpoint to start from
        sources = {role: planned[step].stage for role, step in inputs.items()}
        sources |= {role: stages[made["stage"]] for role, made in artifacts.items() if made["stage"] in stages}
        format = sources[base].format if base in sources else None
        unread = frozenset(stage.unread({*inputs, *given}, format))
        read = (tuple(map(id, sections.values())), unread)
        if read not in pins:
            pins[read] = pin_externals(sections, hash_once, unread)
        identity = _without(unread, {section: identities[id(value)] for section, value in sections.items()})
        identity |= stage.seeds(config.seed, config.data_seed)
        if compute_dtype != "float32" and stage.uses_gpu:
            identity["compute_dtype"] = compute_dtype
        labels = [planned[step].label for step in inputs.values()]
        labels += [_given_label(given[role], artifacts[role]) for role in given]
        step = PlannedStep(
            name=name, stage=stage, inputs=inputs, artifacts=artifacts, identity=identity, externals=pins[read],
            label=str(stage.label(own)) if stage.label is not None else "".join(labels[:1]),
            forced=name in force or "all" in force, config=own, sections=sections, format=format, unread=unread,
        )  # fmt: skip
        step.artifacts |= _find_named(step, store, planned)
        step.judge(store, planned, forced=step.forced)
        if not step.done and locks.is_held(store.lock(step.key)):
            maker = locks.name_process(locks.read_owner(store.lock(step.key)))
            step.state, step.reason = "waiting", f"{maker} is making it"
        planned[name] = step
    return list(planned.values())


def _find_named(step: PlannedStep, store: Store, planned: Mapping[str, PlannedStep]) -> dict[str, Manifest]:
    """Return role → manifest of the artifacts that fields with metadata `artifact: role` name.

    In a run that is repeated the name leads to what the step itself made before: its source is meant then.
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
            if run is not None and before and (source := store.find(before["rid"])) is not None:
                first = store.manifest_of(source)
                repeated = replace(step, artifacts={**step.artifacts, role: first})
                key = repeated.key_with(repeated.contents(store, planned), found[role]["config"].get("iteration"))
                if key == found[role].get("key"):
                    found[role] = first
    return found


def _find_given(where: str, name: str, store: Store) -> Manifest:
    """Return the manifest of the model that import:NAME or artifact:NAME means; `where` is for messages."""
    try:
        found = read_manifest(resolve(store, name.removeprefix("artifact:")))
    except StoreError as error:
        raise ConfigError(f"{where}: {error}") from None
    if found["kind"] != _MODEL:
        raise ConfigError(f"{where}: {found['name']} is a {found['kind']}, no model")
    return found


def _given_label(source: str, manifest: Manifest) -> str:
    """Return the label of steps downstream of a given model: the import's name, or the artifact's own label."""
    if source.startswith("import:"):
        return source.removeprefix("import:")
    return str(manifest["name"]).removeprefix(f"{manifest['stage']}-")[: -len(manifest["rid"][:16]) - 1]


def _without(unread: frozenset[str], identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity without some sections and settings."""
    kept = {section: dict(value) for section, value in identity.items() if section not in unread}
    for path in unread:
        section, _, setting = path.partition(".")
        kept.get(section, {}).pop(setting, None)
    return kept


def entries_of(plan: list[PlannedStep]) -> list[dict[str, Any]]:
    """Return a plan's steps as plain data for reports and status, in topological order."""
    return [
        {
            "step": step.name, "stage": step.stage.name, "kind": step.stage.produces, "artifact": step.artifact,
            "key": step.key, "rid": step.rid, "inputs": step.inputs, "state": step.state, "reason": step.reason,
        }
        for step in plan
    ]  # fmt: skip


_MOST_CHANGES_SHOWN = 3
_LETTERS = 8  # of a key


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Differences between a step and the nearest artifact."""

    nearest: str | None = None  # name of the nearest artifact; None: there is none of this step
    version: tuple[int, int] | None = None  # old and new, if it differs
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # dotted key → old and new value, or "absent"
    inputs: dict[str, str] = field(default_factory=dict)  # role → step, for inputs with different contents
    externals: dict[str, tuple[str, str]] = field(default_factory=dict)  # file or package → old and new pin

    def __str__(self) -> str:
        if self.version is not None:
            return f"stage changed: version {self.version[0]} → {self.version[1]}"
        if self.config:
            pairs = {key: ["null" if one is None else str(one) for one in both] for key, both in self.config.items()}
            texts = [f"{key} {' → '.join(both)}" for key, both in pairs.items()]
            return f"config changed: {first_of(texts, _MOST_CHANGES_SHOWN)}"
        if self.inputs:
            return f"input changed: {', '.join(f'{role} ({source})' for role, source in self.inputs.items())}"
        if code := [name.removeprefix("code ") for name in self.externals if name.startswith("code ")]:
            return f"code changed: {', '.join(code)}"
        return "external data changed" if self.externals else "missing"


def find_difference(step: PlannedStep, store: Store, contents: Mapping[str, str]) -> Difference:
    """Return the differences between a step, whose inputs have these contents, and its nearest artifact."""
    made = (made for made in store.recent(step.stage.name) if made["step"] == step.name)
    nearest = nearest_of(step.identity, made)
    if nearest is None:
        return Difference()
    defaults = _defaults("", step.sections)
    before, now = ({**defaults, **flatten(identity)} for identity in (nearest["config"], step.identity))
    for one, other in ((before, now), (now, before)):
        if "data_seed" in other and "seed" in one:
            one.setdefault("data_seed", one["seed"])  # omitted if both seeds are equal: Stage.seeds
        if step.stage.seeded == "data" and "seed" in one:
            one["data_seed"] = one.pop("seed")
    trees = {role: made.get("tree") for role, made in nearest["inputs"].items()}
    return Difference(
        nearest=nearest["name"],
        version=None if nearest["version"] == step.stage.version else (nearest["version"], step.stage.version),
        config=dict(sorted(changes(before, now, "default").items())),
        inputs={role: step.inputs.get(role, role) for role, tree in contents.items() if trees.get(role) != tree},
        externals=changes(nearest.get("pins", {}), step.externals),
    )


def _defaults(where: str, value: Any) -> dict[str, Any]:
    """Return dotted key → default of the simple fields that a key leaves out at their default."""
    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        for key, item in value.items():
            found |= _defaults(f"{where}{key}.", item)
    for item in fields(value) if is_dataclass(value) else ():
        default = item.metadata.get("since_default", value)
        if default is None or isinstance(default, str | int | float | list):
            found[f"{where}{item.name}"] = default
        found |= _defaults(f"{where}{item.name}.", getattr(value, item.name))
    return found


def nearest_of(identity: Mapping[str, Any], candidates: Iterable[Manifest]) -> Manifest | None:
    """Return the artifact whose config differs from `identity` in the fewest keys; the newest among equals."""
    flat = flatten(identity)
    return min(
        sorted(candidates, key=lambda made: str(made["published"]), reverse=True),
        key=lambda made: len(changes(flatten(made["config"]), flat)), default=None,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Duration and size of an artifact like the one to be made."""

    seconds: float
    bytes: int
    artifact: str = ""  # name of the artifact that the estimate is taken from

    def __str__(self) -> str:
        return f"~{format_seconds(self.seconds)}, {format_bytes(self.bytes)}"


def format_plan(
    plan: list[PlannedStep],
    remarks: Mapping[str, str] | None = None,
    estimates: Mapping[str, Estimate | None] | None = None,
) -> str:
    """Return a line per step: state, artifact, reason, and in brackets remarks and estimates (None: unknown)."""
    width, states = max(len(step.name) for step in plan), max(len(step.state) for step in plan)
    titles = {step.name: step.artifact or f"{step.title} (key {step.key[:_LETTERS]}…)" for step in plan}
    names = max(map(len, titles.values()))
    lines = []
    for step in plan:
        line = f"{step.name:<{width}}  {step.state:<{states}}  {titles[step.name]:<{names}}  {step.reason}".rstrip()
        notes = [remarks[step.name]] if remarks and step.name in remarks else []
        if estimates is not None and step.name in estimates:
            notes.append(str(estimates[step.name] or "no estimate"))
        line += f" ({'; '.join(notes)})" if notes else ""
        lines.append(wrapped(line, width + states + 4))
    counts = {state: sum(step.state == state for step in plan) for state in ("done", "run", "maybe", "waiting")}
    summary = f"{plural(len(plan), 'step')}: {counts['done']} done, {counts['run']} to run"
    summary += "".join(f", {counts[state]} {state}" for state in ("maybe", "waiting") if counts[state])
    return "\n".join([*lines, summary + describe_cost(estimates or {})])


def describe_cost(estimates: Mapping[str, Estimate | None]) -> str:
    """Return the sum of step → estimate as the end of a summary; "" if none is known."""
    known = [estimate for estimate in estimates.values() if estimate is not None]
    total = Estimate(seconds=sum(each.seconds for each in known), bytes=sum(each.bytes for each in known))
    unknown = len(estimates) - len(known)
    return f"; together {total}" + (f" and {unknown} without an estimate" if unknown else "") if known else ""
