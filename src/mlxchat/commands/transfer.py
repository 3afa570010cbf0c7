"""mlxchat export and import: artifacts with everything they were made from, as a folder or a tar file."""

from __future__ import annotations

from pathlib import Path

from mlxchat.commands import import_model
from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.errors import ConfigError
from mlxchat.runner.progress import format_bytes
from mlxchat.runner.store import Store
from mlxchat.runner.transfer import closure, export, import_all


def main_export(arguments: list[str]) -> int:
    """Write artifacts and their closure to --to."""
    parser = make_naming_parser(
        "export",
        "Copy artifacts, and all that they were made from, to a folder (as rsync likes it) or a tar file.",
        "ID",
    )
    parser.add_argument("--to", metavar="PLACE", help="a folder, or FILE.tar, .tar.gz, .tgz, .tar.xz")
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "export", 1, None, "ID… --to PLACE")
    if not options.to:
        raise ConfigError("expected mlxchat export ID… --to PLACE: a folder or a tar file")
    store = Store(outputs_folder(settings))
    folders = closure(store, [store.resolve(name) for name in names])
    to = Path(options.to)
    if to.exists() and to.resolve() == store.outputs.resolve():
        raise ConfigError(f"--to {to} is the outputs folder itself")
    copied = export(store, folders, to)
    size = format_bytes(sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()))
    there = f", {len(folders) - copied} were there" if copied < len(folders) else ""
    print(f"exported {copied} artifacts{there} ({size} in all) to {to}")
    return 0


def main_import(arguments: list[str]) -> int:
    """Take in the artifacts of a folder or tar file, or a model of another make."""
    if arguments and arguments[0] in import_model.FORMATS:
        if len(arguments) == 1:
            raise ConfigError(import_model.tell_forms(arguments[0]))
        return import_model.main(arguments[0], arguments[1:])
    parser = make_naming_parser(
        "import",
        "Take in the artifacts of an exported folder or tar file; every file is hashed first. For models of other "
        "makes: mlxchat import nanochat --help, mlxchat import hf --help",
        "PLACE",
    )
    parser.add_argument("--forget", metavar="NAME", help="let import:NAME stand for nothing; gc may then remove it")
    options = parser.parse_intermixed_args(arguments)
    if options.forget is not None:
        _, settings = take_names(options.settings, "import", 0, 0, "--forget NAME")
        return import_model.forget(Store(outputs_folder(settings)), options.forget)
    (source,), settings = take_names(options.settings, "import", 1, 1, "PLACE")
    store = Store(outputs_folder(settings))
    new, known = import_all(store, Path(source))
    for place in new:
        print(f"imported {place.name}")
    print(f"{len(new)} artifacts imported into {store.outputs}, {len(known)} were there")
    return 0
