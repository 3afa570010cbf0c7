"""mlxchat diff: how two artifacts differ."""

from __future__ import annotations

from typing import Any

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.commands.columns import aligned, print_json, show_value
from mlxchat.runner.comparing import differences
from mlxchat.runner.store import Store, read_manifest
from mlxchat.visible import visible


def main(arguments: list[str]) -> int:
    """Print each difference as key, old → new."""
    parser = make_naming_parser(
        "diff", "Show how two artifacts differ: config, inputs, code, metrics, environment.", "A B"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "diff", 2, 2, "A B")
    store = Store(outputs_folder(settings))
    old, new = (read_manifest(store.resolve(name)) for name in names)
    found = differences(old, new)
    if options.json:
        print_json({"a": old["name"], "b": new["name"], **found})
        return 0
    print(visible(f"a  {old['name']}\nb  {new['name']}"))
    for section, changes in found.items():
        if changes:
            rows = [[key, f"{_pair(a, b)}{_delta(a, b)}"] for key, (a, b) in changes.items()]
            print(f"{section}\n{aligned(rows, indent='  ')}")
    same = [section for section, changes in found.items() if not changes]
    print(f"equal: {', '.join(same)}" if any(found.values()) else "no difference")
    return 0


def _pair(old: Any, new: Any) -> str:
    """Return old → new, in six digits where those tell them apart."""
    short = [f"{value:.6g}" if isinstance(value, float) else show_value(value) for value in (old, new)]
    return " → ".join(short if short[0] != short[1] else [show_value(old), show_value(new)])


def _delta(old: Any, new: Any) -> str:
    """Return a float's change, relative to what it was."""
    if not (isinstance(old, float) and isinstance(new, float)) or not old:
        return ""
    return f"  ({(new - old) / abs(old):+.1%})"
