"""Verbs that pin, remove and copy artifacts: pin, gc, rm, push, pull."""

import re
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mlxchat.commands.arguments import Parser, count, print_json
from mlxchat.config.wording import aligned, format_bytes, plural
from mlxchat.errors import ConfigError, suggest
from mlxchat.store.catalog import closure
from mlxchat.store.gc import Collection, collect, find_garbage, find_removal, runs_in_progress
from mlxchat.store.naming import PINS, Run, find_all, links, meaning, resolve
from mlxchat.store.store import Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def pin(parser: Parser) -> None:
    parser.take_names("[ID [NAME]]", least=0, most=2)
    parser.add_argument("--remove", action="append", default=[], metavar="PIN", help="remove this pin")
    parser.add_json("list the pins as one JSON object")


def _pin(options: Namespace) -> int:
    """Pin an artifact, remove a pin, or list the pins."""
    names, store = options.names, Store(options.outputs)
    for name in options.remove:
        link = store.outputs / "refs" / PINS / name
        if not _NAME.fullmatch(name) or not link.is_symlink():
            raise ConfigError(f'there is no pin "{name}".{suggest(name, links(store, PINS))}')
        link.unlink()
        print(f"removed pin {name}")
    if names:
        place = resolve(store, names[0])
        name = names[1] if len(names) == 2 else place.name
        if not _NAME.fullmatch(name):
            raise ConfigError(f'"{name}" is not a pin name, expected letters, digits, . _ - and no /')
        store.set_ref(PINS, name, place)
        print(f"pinned {place.name} as {name}")
    elif not options.remove:
        found = links(store, PINS)
        if options.json:
            print_json({name: place.name for name, place in found.items()})
        else:
            print(aligned([[name, place.name] for name, place in found.items()]) or "no pins: mlxchat pin ID [NAME]")
    return 0


def gc(parser: Parser) -> None:
    parser.add_argument("--apply", action="store_true", help="remove them; without this nothing changes")
    keep = "for finished runs, keep the newest N artifacts of each step"
    parser.add_argument("--keep-last", type=count, metavar="N", help=keep)
    parser.add_json()


def _gc(options: Namespace) -> int:
    """Print what may be removed, with size and reason; with --apply remove it."""
    store = Store(options.outputs)
    find = partial(find_garbage, store, options.keep_last)
    found = collect(store, find) if options.apply and (store.outputs / "store").is_dir() else find()
    _print_garbage(found, options)
    return 0


def _print_garbage(found: Collection, options: Namespace) -> None:
    """Print what is removed and what stays, of `gc` and `rm`."""
    kept, places = sum(found.kept.values()), [str(each.path.relative_to(options.outputs)) for each in found.garbage]
    if options.json:
        garbage = [asdict(each) | {"path": place} for each, place in zip(found.garbage, places, strict=True)]
        print_json({"applied": options.apply, "garbage": garbage, "kept": sorted(found.kept), "kept_bytes": kept})
        return
    both = zip(found.garbage, places, strict=True)
    if rows := [[place, format_bytes(each.bytes), each.reason] for each, place in both if each.kind != "ref"]:
        print(aligned(rows, right=(1,), indent="  "))
    stays = f"{plural(len(found.kept), 'artifact')} kept ({format_bytes(kept)})"
    size = format_bytes(sum(item.bytes for item in found.garbage))
    if options.apply:
        print(f"removed {size}; {stays}")
    else:
        print(f"{size} can be removed; {stays}. Nothing changed: add --apply to remove it")


def rm(parser: Parser) -> None:
    parser.take_names("RUN…", most=None)
    parser.description = (
        "Show what goes with a run, and how many bytes; --apply removes it. With a run go its names and events, and "
        "those of its artifacts that nothing else needs: a pin, another run, or what was made from them keeps them."
    )
    parser.add_argument("--apply", action="store_true", help="remove it; without this nothing changes")
    parser.add_argument("--force", action="store_true", help="also runs that may be in progress")
    parser.add_json()


def _rm(options: Namespace) -> int:
    """Print what removing runs removes; with --apply remove it."""
    store = Store(options.outputs)
    runs = set()
    for name in options.names:
        meant = meaning(store, name)
        if not isinstance(meant, Run):
            raise ConfigError(f'"{name}" is {meant.place.name}, not a run. `mlxchat gc` removes unused artifacts')
        runs.add(meant.name)
    if not options.force and (busy := ", ".join(sorted(runs & runs_in_progress(store).keys()))):
        raise ConfigError(f"run {busy} began less than a day ago and has no recorded end. To remove it: --force")
    find = partial(find_removal, store, runs)
    _print_garbage(collect(store, find) if options.apply else find(), options)
    return 0


_PUSH_PLACE = """PLACE: a folder (which rsync can copy further), hf://[datasets/]ORGANISATION/NAME[/PATH], s3://BUCKET/PATH,
or another URL that fsspec supports"""
_PULL_PLACE = """PLACE: where `mlxchat push` wrote, or an outputs folder
ARTIFACT: its folder there, or the start of its id; what it was made from comes along. Without any: everything"""


def push(parser: Parser) -> None:
    parser.take_names("ID… PLACE", least=2, most=None, about=_PUSH_PLACE)
    parser.description = "Copy artifacts, or all of a run, to another place, with everything that they were made from."
    parser.add_argument("--public", action="store_true", help="with hf://: make the repository public")


def _push(options: Namespace) -> int:
    """Write artifacts and their inputs to a folder or a URL."""
    from mlxchat.hub.places import export_to, open_place, push_artifacts

    *names, place = options.names
    store = Store(options.outputs)
    folders = closure(store, [each for name in names for each in find_all(store, name)])
    to = open_place(place)
    if place.startswith("hf://"):
        copied = push_artifacts(to, folders, public=options.public)
    elif options.public:
        raise ConfigError("--public requires a place of the Hub: hf://ORGANISATION/NAME")
    else:
        copied = export_to(to, folders)
    size = format_bytes(sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()))
    there = f", {len(folders) - copied} already there" if copied < len(folders) else ""
    print(f"pushed {plural(copied, 'artifact')}{there} ({size} in all) to {place}")
    return 0


def pull(parser: Parser) -> None:
    parser.take_names("PLACE [ARTIFACT…]", most=None, about=_PULL_PLACE)
    parser.description = "Take in artifacts that were pushed, with everything that they were made from; hashed first."


def _pull(options: Namespace) -> int:
    """Import the artifacts of a folder or a URL."""
    from mlxchat.hub.places import import_from, open_place

    source, *wanted = options.names
    store = Store(options.outputs)
    if "://" not in source and not Path(source).is_dir():
        raise ConfigError(f"{source} is no folder: expected one that `mlxchat push` wrote, or a URL")
    new, known = import_from(store, open_place(source), wanted)
    for place in new:
        print(f"pulled {place.name}")
    print(f"{plural(len(new), 'artifact')} pulled into {store.outputs}, {len(known)} already there")
    return 0
