"""mlxchat verify: read artifacts again and compare them with what was written down."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, split_words
from mlxchat.commands.columns import print_json
from mlxchat.config.wording import format_bytes
from mlxchat.errors import MlxchatError, StoreError, visible
from mlxchat.store.bases import find_chain, is_adapter
from mlxchat.store.integrity import makers, remedy
from mlxchat.store.naming import find_all
from mlxchat.store.store import MANIFEST, Manifest, Store, read_manifest
from mlxchat.store.verifying import check_contents, find_absent


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
    places = [place for name in names for place in find_all(store, name)] or [
        place for place in every if (place / MANIFEST).exists()
    ]
    places = list(dict.fromkeys(places))
    faults: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for place in places:
        if found := list(check_contents(place)):
            faults[place.name] = found
        elif found := list(find_absent(store, place)) or _faults_below(place):
            absent[place.name] = found
        if found and not options.json:
            print("\n".join(visible(f"{place.name}  {fault}") for fault in found), flush=True)
    size = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
    if options.json:
        print_json({"artifacts": len(places), "bytes": size, "faults": faults, "absent": absent})
    elif not places:
        print(f"{store.outputs} holds no artifacts yet: run mlxchat first")
    else:
        count = "1 artifact is" if len(places) == 1 else f"{len(places)} artifacts are"
        told = f"{len(faults)} of {len(places)} artifacts differ" if faults else f"{count} right"
        print(f"{told} ({format_bytes(size)} hashed)")
        if faults:
            print(visible(remedy(_manifests(store, faults))))
        if absent:
            print(
                f"{len(absent)} of {len(places)} artifacts are intact but lack what they were made from: keep them "
                f"and run again: {visible(makers(_manifests(store, absent)))}"
            )
    return int(bool(faults or absent))


def _manifests(store: Store, names: Iterable[str]) -> list[Manifest]:
    """Return the manifests of artifacts that can be read."""
    found = []
    for name in names:
        with suppress(StoreError):
            found.append(read_manifest(store.outputs / "store" / name))
    return found


def _faults_below(place: Path) -> list[str]:
    """Return what keeps adapters, whose own files are right, from being computed with what they rest on."""
    if not is_adapter(place):
        return []
    try:
        find_chain(place)
    except MlxchatError as error:
        return [str(error)]
    return []
