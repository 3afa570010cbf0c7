"""mlxchat diff: how two artifacts, or the steps of two runs, differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.commands.columns import aligned, print_json, show_value
from mlxchat.errors import visible
from mlxchat.store.comparing import differences
from mlxchat.store.naming import Run, links, meaning
from mlxchat.store.store import Store, read_manifest


def main(arguments: list[str]) -> int:
    """Print each difference as key, old → new."""
    parser = make_naming_parser(
        "diff",
        "Show how two artifacts, or the steps of two runs, differ: config, inputs, code, metrics, environment.",
        "A B",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "diff", 2, 2, "A B")
    store = Store(outputs_folder(settings))
    runs = [meant.name for name in names if isinstance(meant := meaning(store, name), Run)]
    pairs = _pair_steps(store, *runs) if len(runs) == len(names) else {"": tuple(map(store.resolve, names))}
    if options.json:
        records = {step: _describe(*pair) for step, pair in pairs.items()}
        print_json(records if len(runs) == len(names) else records[""])
        return 0
    for step, (a, b) in pairs.items():
        if step:
            print(visible(f"\n── {step}"))
        _show(a, b)
    return 0


def _pair_steps(store: Store, *runs: str) -> dict[str, tuple[Path | None, Path | None]]:
    """Return step → its artifact in either run; None: that run has no such step."""
    old, new = (links(store, run) for run in runs)
    return {step: (old.get(step), new.get(step)) for step in dict.fromkeys([*old, *new])}


def _describe(a: Path | None, b: Path | None) -> dict[str, Any]:
    if a is None or b is None:
        return {"a": a and a.name, "b": b and b.name}
    return {"a": a.name, "b": b.name, **differences(read_manifest(a), read_manifest(b))}


def _show(a: Path | None, b: Path | None) -> None:
    """Print how two artifacts differ."""
    if a is None or b is None:
        print(f"only in {'a' if b is None else 'b'}")
        return
    if a == b:
        print(visible(f"a and b  {a.name}\nno difference"))
        return
    print(visible(f"a  {a.name}\nb  {b.name}"))
    found = differences(read_manifest(a), read_manifest(b))
    for section, changes in found.items():
        if changes:
            rows = [[key, f"{_pair(a, b)}{_delta(a, b)}"] for key, (a, b) in changes.items()]
            print(f"{section}\n{aligned(rows, indent='  ')}")
    same = [section for section, changes in found.items() if not changes]
    print(f"equal: {', '.join(same)}" if any(found.values()) else "no difference")


def _pair(old: Any, new: Any) -> str:
    """Return old → new, in six digits where those tell them apart."""
    short = [f"{value:.6g}" if isinstance(value, float) else show_value(value) for value in (old, new)]
    return " → ".join(short if short[0] != short[1] else [show_value(old), show_value(new)])


def _delta(old: Any, new: Any) -> str:
    """Return a float's change, relative to what it was."""
    if not (isinstance(old, float) and isinstance(new, float)) or not old:
        return ""
    return f"  ({(new - old) / abs(old):+.1%})"
