"""Texts about a plan: why each step runs, what it will take, and the table of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxchat.config.wording import first_of, format_bytes, format_seconds, plural, wrapped
from mlxchat.store.fingerprint import changes, flatten, left_out_of
from mlxchat.store.manifest import Manifest
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.runner.plan import PlannedStep

_MOST_CHANGES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Differences between a step and the nearest artifact."""

    nearest: str | None = None
    """Name of the nearest artifact; None: there is none of this step."""
    version: tuple[int, int] | None = None
    """VERSION, old and new, if it differs."""
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Dotted key → old and new value; "absent" if there is none."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Role → step, for inputs with different contents."""
    externals: dict[str, tuple[str, str]] = field(default_factory=dict)
    """File or package → old and new pin."""

    @property
    def only_inputs(self) -> bool:
        """Whether nothing but inputs differ."""
        return self.nearest is not None and not (self.version or self.config or self.externals)

    def __str__(self) -> str:
        """Return the differences in one line; the first few keys suffice for people."""
        if self.nearest is None:
            return "missing"
        if self.version is not None:
            return f"stage changed: version {self.version[0]} → {self.version[1]}"
        if self.config:
            return f"config changed: {first_of(_describe_changes(self.config), _MOST_CHANGES_SHOWN)}"
        if self.inputs:
            return f"input changed: {', '.join(f'{role} ({source})' for role, source in self.inputs.items())}"
        if code := [name.removeprefix("code ") for name in self.externals if name.startswith("code ")]:
            return f"code changed: {', '.join(code)}"
        return "external data changed" if self.externals else "missing"


def find_difference(step: PlannedStep, store: Store, contents: Mapping[str, str]) -> Difference:
    """Return the differences between a step, whose inputs have these contents, and its nearest artifact."""
    artifacts = store.recent(step.stage.name)
    nearest = nearest_of(step.identity, (made for made in artifacts if made["step"] == step.name))
    if nearest is None:
        return Difference()
    before, now = flatten(nearest["config"]), flatten(step.identity)
    for one, other in ((before, now), (now, before)):
        if "data_seed" in other and "seed" in one:
            one.setdefault("data_seed", one["seed"])  # omitted if both seeds are equal: Stage.seeds
        if step.stage.seeded == "data" and "seed" in one:
            one["data_seed"] = one.pop("seed")
    pins = nearest.get("pins", {})
    return Difference(
        nearest=nearest["name"],
        version=None if nearest["version"] == step.stage.version else (nearest["version"], step.stage.version),
        config=dict(sorted(changes(before, now, left_out_of(step.sections)).items())),
        inputs={
            role: step.inputs.get(role, role)
            for role, tree in contents.items()
            if nearest["inputs"].get(role, {}).get("tree") != tree
        },
        externals=changes(pins, step.externals),
    )


def nearest_of(identity: Mapping[str, Any], candidates: Iterable[Manifest]) -> Manifest | None:
    """Return the artifact whose config differs from `identity` in the fewest keys; the newest among equals."""
    flat = flatten(identity)
    best: tuple[int, str, Manifest] | None = None
    for manifest in candidates:
        other = flatten(manifest["config"])
        common = flat.keys() & other.keys()
        distance = len(flat) + len(other) - 2 * len(common) + sum(flat[key] != other[key] for key in common)
        # Fewest differences first, then newest: compare (−distance, time).
        if best is None or (-distance, manifest["published"]) > (-best[0], best[1]):
            best = (distance, manifest["published"], manifest)
    return best[2] if best else None


def _describe_changes(config: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return key, old and new value of each change; one text for all tasks that a mixture or suite lost and gained.

    The rate of an AdamW group is left out if the setting that it is taken from (`optimizer.matrix_lr`) changed alike.
    """
    lost: dict[str, list[str]] = {}
    gained: dict[str, list[str]] = {}
    for key, change in config.items():
        mapping, _, name = key.removesuffix(".task").rpartition(".")
        if key.endswith(".task") and "absent" in change:
            (gained if change[0] == "absent" else lost).setdefault(mapping, []).append(name)
    shown = []
    for mapping in sorted(lost | gained):
        names = [first_of(side.get(mapping, []), _MOST_CHANGES_SHOWN) for side in (lost, gained)]
        shown.append(f"{mapping} {names[0] or 'also has'}{' → ' if all(names) else ' '}{names[1] or 'removed'}")
    told = {f"{mapping}.{name}" for side in (lost, gained) for mapping, names in side.items() for name in names}
    rates = [change for key, change in config.items() if key.endswith("_lr")]
    for key, (old, new) in config.items():
        is_copy = ".adamw_groups." in key and key.endswith(".lr") and (old, new) in rates
        if not is_copy and key.rpartition(".")[0] not in told:
            shown.append(f"{key} {_show(old)} → {_show(new)}")
    return shown


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Duration and size of an artifact like the one to be made."""

    seconds: float
    bytes: int
    artifact: str = ""
    """Name of the artifact that the estimate is taken from."""

    def __str__(self) -> str:
        """Return the estimate as text."""
        return f"~{format_seconds(self.seconds)}, {format_bytes(self.bytes)}"


def estimate_steps(plan: list[PlannedStep], store: Store) -> dict[str, Estimate | None]:
    """Return step → estimate for unfinished steps; None if the store has no similar artifact.

    The estimate comes from the artifact of the same stage and label (a model's size, a corpus) with the fewest other
    differences in its config: a small model's duration says nothing about a large one's.
    """
    found: dict[str, Estimate | None] = {}
    for step in plan:
        if step.done:
            continue
        made = (made for made in store.recent(step.stage.name) if made["name"].rpartition("-")[0] == step.title)
        nearest = nearest_of(step.identity, made)
        found[step.name] = None
        if nearest is not None:
            size = sum(file["bytes"] for file in nearest["outputs"])
            found[step.name] = Estimate(seconds=nearest["seconds"], bytes=size, artifact=nearest["name"])
    return found


_SHOWN = 8  # letters per key


def format_plan(
    plan: list[PlannedStep],
    remarks: Mapping[str, str] | None = None,
    estimates: Mapping[str, Estimate | None] | None = None,
) -> str:
    """Return a line per step: state, artifact, reason, and in brackets remarks and estimates (None: unknown)."""
    width = max(len(step.name) for step in plan)
    titles = {step.name: step.artifact or f"{step.title} (key {step.key[:_SHOWN]}…)" for step in plan}
    names = max(map(len, titles.values()))
    states = max(len(step.state) for step in plan)
    lines = []
    for step in plan:
        line = f"{step.name:<{width}}  {step.state:<{states}}  {titles[step.name]:<{names}}  {step.reason}".rstrip()
        notes = [remarks[step.name]] if remarks and step.name in remarks else []
        if estimates is not None and step.name in estimates:
            notes.append(str(estimates[step.name] or "no estimate"))
        line += f" ({'; '.join(notes)})" if notes else ""
        lines.append(wrapped(line, width + states + 4))
    counts = {state: sum(step.state == state for step in plan) for state in ("run", "maybe", "waiting")}
    summary = f"{plural(len(plan), 'step')}: {sum(step.done for step in plan)} done, {counts['run']} to run"
    summary += "".join(f", {counts[state]} {state}" for state in ("maybe", "waiting") if counts[state])
    known = [estimate for estimate in (estimates or {}).values() if estimate is not None]
    if known:
        total = Estimate(seconds=sum(each.seconds for each in known), bytes=sum(each.bytes for each in known))
        unknown = len(estimates or {}) - len(known)
        summary += f"; together {total}" + (f" and {unknown} without an estimate" if unknown else "")
    return "\n".join([*lines, summary])
