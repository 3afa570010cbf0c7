"""Verbs that keep, remove and copy artifacts: pin, gc, export and import of artifacts."""

from __future__ import annotations

import re
from pathlib import Path

from mlxchat.commands.arguments import make_naming_parser, make_parser, outputs_folder, take_names
from mlxchat.commands.columns import aligned, print_json
from mlxchat.config.wording import format_bytes, plural
from mlxchat.errors import ConfigError, suggest
from mlxchat.store.gc import Collection, Limits, collect, find_garbage, parse_age, parse_bytes
from mlxchat.store.manifest import MANIFEST, read_manifest
from mlxchat.store.naming import MODEL, PINS, find_all, links
from mlxchat.store.store import Store
from mlxchat.store.transfer import closure, export, import_all, is_url

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def pin(arguments: list[str]) -> int:
    """Pin an artifact, remove a pin, or list the pins."""
    parser = make_naming_parser("pin", "Pin an artifact under a name; without arguments, list the pins.", "ID [NAME]")
    parser.add_argument("--remove", action="append", default=[], metavar="NAME", help="remove this pin")
    parser.add_argument("--json", action="store_true", help="list the pins as JSON")
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "pin", 0, 2, "ID [NAME]")
    store = Store(outputs_folder(settings))
    for name in options.remove:
        link = store.outputs / "refs" / PINS / name
        if not _NAME.fullmatch(name) or not link.is_symlink():
            raise ConfigError(f'there is no pin "{name}".{suggest(name, links(store, PINS))}')
        link.unlink()
        print(f"removed pin {name}")
    if names:
        place = store.resolve(names[0])
        name = names[1] if len(names) == 2 else place.name
        if not _NAME.fullmatch(name):
            raise ConfigError(f'"{name}" is no name for a pin: letters, digits, . _ - and no / are')
        store.set_ref(PINS, name, place)
        print(f"pinned {place.name} as {name}")
    elif not options.remove:
        found = links(store, PINS)
        if options.json:
            print_json({name: place.name for name, place in found.items()})
        else:
            print(aligned([[name, place.name] for name, place in found.items()]) or "no pins: mlxchat pin ID [NAME]")
    return 0


def gc(arguments: list[str]) -> int:
    """Print what may go with bytes and reason; with --apply remove it."""
    parser = make_parser("gc", "Show what may be removed and why; --apply removes it.")
    parser.add_argument("--apply", action="store_true", help="remove it; without this nothing is changed")
    parser.add_argument(
        "--keep-last", type=int, metavar="N", help="of ended runs, keep the newest N artifacts of a step"
    )
    parser.add_argument("--older-than", metavar="AGE", help="of ended runs, keep what is younger: 12h, 7d, 2w")
    parser.add_argument("--max-bytes", metavar="SIZE", help="remove the oldest until the store is this small: 10GB")
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options = parser.parse_intermixed_args(arguments)
    if options.keep_last is not None and options.keep_last < 0:
        raise ConfigError(f"--keep-last is {options.keep_last}, expected 0 or more")
    limits = Limits(
        keep_last=options.keep_last,
        older_than_seconds=parse_age(options.older_than) if options.older_than else None,
        max_bytes=parse_bytes(options.max_bytes) if options.max_bytes else None,
    )
    store = Store(outputs_folder(options.settings))
    there = (store.outputs / "store").is_dir()
    found = collect(store, limits) if options.apply and there else find_garbage(store, limits)
    if options.json:
        garbage = [
            {
                "path": str(item.path.relative_to(store.outputs)),
                "kind": item.kind,
                "bytes": item.bytes,
                "reason": item.reason,
            }
            for item in found.garbage
        ]
        print_json({"applied": options.apply, "garbage": garbage, "kept": found.kept, "kept_bytes": found.kept_bytes})
    else:
        _show_garbage(found, options.apply, store, limits)
    return 0


def _show_garbage(found: Collection, applied: bool, store: Store, limits: Limits) -> None:
    listed = [item for item in found.garbage if item.kind != "ref"]
    if found.kept:
        kept = sorted((reason, name) for name, reason in found.kept.items())
        print("stays")
        print(aligned([[f"store/{name}", reason] for reason, name in kept], indent="  "))
    if listed:
        print("may go" if not applied else "removed")
        rows = [[str(item.path.relative_to(store.outputs)), format_bytes(item.bytes), item.reason] for item in listed]
        print(aligned(rows, right=(1,), indent="  "))
    links = len(found.garbage) - len(listed)
    if links:
        print(f"and {links} names that lead to nothing")
    size = format_bytes(sum(item.bytes for item in found.garbage))
    stay = "1 artifact stays" if len(found.kept) == 1 else f"{len(found.kept)} artifacts stay"
    staying = f"{stay} ({format_bytes(found.kept_bytes)})"
    if not found.garbage:
        print(f"nothing to remove: {staying}")
        if not limits.given() and found.kept:
            print("The names of ended runs keep their artifacts: --keep-last, --older-than or --max-bytes lets them go")
    elif applied:
        print(f"removed {size}; {staying}")
    else:
        print(f"{size} may go; {staying}. Nothing was changed: add --apply to remove it")


_LOCAL = ("file://", "local://")


def main_export(arguments: list[str]) -> int:
    """Write artifacts and their closure to --to."""
    parser = make_naming_parser(
        "export",
        "Copy artifacts, and all that they were made from, to a folder (as rsync likes it) or a tar file.",
        "ID",
    )
    parser.add_argument("--to", metavar="PLACE", help="a folder, FILE.tar, .tar.gz, .tgz, .tar.xz, or a URL")
    parser.add_argument("--public", action="store_true", help="of hf://: everybody may see the repository")
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "export", 1, None, "ID… --to PLACE")
    if not options.to:
        raise ConfigError("expected mlxchat export ID… --to PLACE: a folder or a tar file")
    store = Store(outputs_folder(settings))
    folders = closure(store, [place for name in names for place in find_all(store, name)])
    if is_url(options.to) and not options.to.startswith(_LOCAL):
        return _export_elsewhere(options.to, folders, public=options.public)
    to = Path(_without_scheme(options.to))
    if to.exists() and to.resolve() == store.outputs.resolve():
        raise ConfigError(f"--to {to} is the outputs folder itself")
    copied = export(store, folders, to)
    _tell(copied, folders, to)
    return 0


def _tell(copied: int, folders: list[Path], to: Path | str) -> None:
    size = format_bytes(sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()))
    there = f", {len(folders) - copied} were there" if copied < len(folders) else ""
    print(f"exported {plural(copied, 'artifact')}{there} ({size} in all) to {to}")


def _export_elsewhere(url: str, folders: list[Path], *, public: bool) -> int:
    from mlxchat.hub import remote

    place = remote.open_place(url)
    if url.startswith("hf://"):
        from mlxchat.hub.upload import push_artifacts

        copied = push_artifacts(place, folders, public=public)
    elif public:
        raise ConfigError("--public is of hf://, and of --push")
    else:
        copied = remote.export_to(place, folders)
    _tell(copied, folders, place.url)
    return 0


def _without_scheme(place: str) -> str:
    return next((place.removeprefix(scheme) for scheme in _LOCAL if place.startswith(scheme)), place)


def _tell_next(store: Store, places: list[Path]) -> None:
    """Say how the model that came in is used."""
    models = [place for place in places if read_manifest(place).get("kind") == MODEL]
    if not models:
        return
    name = models[-1].name
    print(f"{name}: mlxchat chat {name}, mlxchat report {name}")


def main_import(arguments: list[str]) -> int:
    """Take in the artifacts of a folder or tar file, or a model of another make."""
    from mlxchat.commands import models

    if arguments and arguments[0] in models.IMPORT_FORMATS:
        if len(arguments) == 1:
            raise ConfigError(models.tell_forms(arguments[0]))
        return models.import_as(arguments[0], arguments[1:])
    parser = make_naming_parser(
        "import",
        "Take in the artifacts of an exported folder or tar file; every file is hashed first. For models of other "
        "makes: mlxchat import nanochat --help, mlxchat import hf --help, mlxchat import adapter --help",
        "PLACE",
    )
    parser.usage = "mlxchat import PLACE [ARTIFACT…] [outputs=PATH]\n       mlxchat import nanochat|hf|adapter WHAT"
    parser.add_argument("--forget", metavar="NAME", help="let import:NAME stand for nothing; gc may then remove it")
    options = parser.parse_intermixed_args(arguments)
    if options.forget is not None:
        _, settings = take_names(options.settings, "import", 0, 0, "--forget NAME")
        return models.forget(Store(outputs_folder(settings)), options.forget)
    # A URL may have a "=" of its own, which makes it no setting.
    urls = [word for word in options.settings if is_url(word)]
    rest = [word for word in options.settings if word not in urls]
    names, settings = take_names(rest, "import", 1 - len(urls[:1]), None, "PLACE [ARTIFACT…]")
    source, wanted = (urls + names)[0], (urls + names)[1:]
    store = Store(outputs_folder(settings))
    if not is_url(source) and (Path(source) / MANIFEST).is_file():
        path = Path(source).resolve()
        source, wanted = str(path.parent), [path.name, *wanted]
    if is_url(source) or wanted:
        from mlxchat.hub.remote import import_from, open_place

        if not is_url(source) and not Path(source).is_dir():
            raise ConfigError(f"{source} is no folder; of a tar file everything is taken in")
        url = source if is_url(source) else f"file://{Path(source).resolve()}"
        new, known = import_from(store, open_place(url), wanted)
    else:
        new, known = import_all(store, Path(source))
    for place in new:
        print(f"imported {place.name}")
    print(f"{plural(len(new), 'artifact')} imported into {store.outputs}, {len(known)} already there")
    _tell_next(store, new or known)
    return 0
