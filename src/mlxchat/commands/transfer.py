"""mlxchat export and import: artifacts with all that they were made from, as a folder, a tar file, or behind a URL."""

from __future__ import annotations

from pathlib import Path

from mlxchat.commands import import_model
from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.config.wording import format_bytes, plural
from mlxchat.errors import ConfigError
from mlxchat.store.naming import MODEL, find_all
from mlxchat.store.store import MANIFEST, Store, read_manifest
from mlxchat.store.transfer import closure, export, import_all, is_url

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
    if arguments and arguments[0] in import_model.FORMATS:
        if len(arguments) == 1:
            raise ConfigError(import_model.tell_forms(arguments[0]))
        return import_model.main(arguments[0], arguments[1:])
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
        return import_model.forget(Store(outputs_folder(settings)), options.forget)
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
