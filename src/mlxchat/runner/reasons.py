"""Texts about a plan: why each step runs, what it will take, and the table of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from mlxchat.config.wording import first_of, format_bytes, format_seconds, plural, wrapped
from mlxchat.store.fingerprint import changes, flatten
from mlxchat.store.manifest import Manifest
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.runner.plan import PlannedStep

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

    @property
    def only_inputs(self) -> bool:
        """Whether nothing but inputs differ."""
        return self.nearest is not None and not (self.version or self.config or self.externals)

    def __str__(self) -> str:
        """Return the differences in one line; the first few keys suffice for people."""
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
    return Difference(
        nearest=nearest["name"],
        version=None if nearest["version"] == step.stage.version else (nearest["version"], step.stage.version),
        config=dict(sorted(changes(before, now, "default").items())),
        inputs={
            role: step.inputs.get(role, role)
            for role, tree in contents.items()
            if nearest["inputs"].get(role, {}).get("tree") != tree
        },
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
    ranked = [
        (-len(changes(flatten(each["config"]), flat)), each["published"], -number, each)
        for number, each in enumerate(candidates)
    ]
    return max(ranked)[-1] if ranked else None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Duration and size of an artifact like the one to be made."""

    seconds: float
    bytes: int
    artifact: str = ""  # name of the artifact that the estimate is taken from

    def __str__(self) -> str:
        """Return the estimate as text."""
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
    known = [estimate for estimate in (estimates or {}).values() if estimate is not None]
    if known:
        total = Estimate(seconds=sum(each.seconds for each in known), bytes=sum(each.bytes for each in known))
        unknown = len(estimates or {}) - len(known)
        summary += f"; together {total}" + (f" and {unknown} without an estimate" if unknown else "")
    return "\n".join([*lines, summary])
