"""mlxchat verify: read artifacts again and compare them with what was written down."""

from __future__ import annotations

from pathlib import Path

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, split_words
from mlxchat.commands.columns import print_json
from mlxchat.errors import MlxchatError
from mlxchat.runner.bases import find_chain, is_adapter
from mlxchat.runner.progress import format_bytes
from mlxchat.runner.store import MANIFEST, Store
from mlxchat.runner.verifying import find_faults


def main(arguments: list[str]) -> int:
    """Verify all artifacts or those that are named; return 1 if something differs."""
    parser = make_naming_parser(
        "verify", "Hash every file of all artifacts, or of those that are named, and list what differs.", "ID"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options = parser.parse_intermixed_args(arguments)
    names, settings = split_words(options.settings)
    store = Store(outputs_folder(settings))
    base = store.outputs / "store"
    every = sorted(base.iterdir()) if base.is_dir() else []
    places = [store.resolve(name) for name in names] or [place for place in every if (place / MANIFEST).exists()]
    faults: dict[str, list[str]] = {}
    for place in dict.fromkeys(places):
        found = list(find_faults(store, place)) or _faults_below(place)
        if found:
            faults[place.name] = found
            if not options.json:
                print("\n".join(f"{place.name}  {fault}" for fault in found), flush=True)
    size = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
    if options.json:
        print_json({"artifacts": len(places), "bytes": size, "faults": faults})
    elif not places:
        print(f"{store.outputs} holds no artifacts yet: run mlxchat first")
    else:
        count = "1 artifact is" if len(places) == 1 else f"{len(places)} artifacts are"
        told = f"{len(faults)} of {len(places)} artifacts differ" if faults else f"{count} right"
        remedy = ". Remove their folders; the next run makes them again" if faults else ""
        print(f"{told} ({format_bytes(size)} hashed){remedy}")
    return int(bool(faults))


def _faults_below(place: Path) -> list[str]:
    """Return what keeps adapters, whose own files are right, from being computed with what they rest on."""
    if not is_adapter(place):
        return []
    try:
        find_chain(place)
    except MlxchatError as error:
        return [str(error)]
    return []
