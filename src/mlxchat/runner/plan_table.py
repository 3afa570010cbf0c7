"""The plan as lines for people."""

from __future__ import annotations

from collections.abc import Mapping

from mlxchat.config.wording import plural
from mlxchat.runner.estimates import Estimate
from mlxchat.runner.plan import PlannedStep

_SHOWN = 8  # letters of a key


def format_plan(
    plan: list[PlannedStep],
    remarks: Mapping[str, str] | None = None,
    estimates: Mapping[str, Estimate | None] | None = None,
) -> str:
    """Return a line per step: state, artifact, reason, and in brackets remarks on steps that have some.

    Args:
        plan: the steps.
        remarks: step → what else is known of it.
        estimates: step → what it will take; None: nothing is known.
    """
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
        lines.append(f"{line} ({'; '.join(notes)})" if notes else line)
    counts = {state: sum(step.state == state for step in plan) for state in ("run", "maybe", "waiting")}
    summary = f"{plural(len(plan), 'step')}: {sum(step.done for step in plan)} done, {counts['run']} to run"
    summary += "".join(f", {counts[state]} {state}" for state in ("maybe", "waiting") if counts[state])
    known = [estimate for estimate in (estimates or {}).values() if estimate is not None]
    if known:
        total = known[0].__class__(
            seconds=sum(each.seconds for each in known), bytes=sum(each.bytes for each in known), artifact=""
        )
        unknown = len(estimates or {}) - len(known)
        summary += f"; together {total}" + (f" and {unknown} without an estimate" if unknown else "")
    return "\n".join([*lines, summary])
