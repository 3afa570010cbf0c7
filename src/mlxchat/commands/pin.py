"""mlxchat pin: give an artifact a name that keeps it from being collected."""

from __future__ import annotations

import re

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.commands.columns import aligned, print_json
from mlxchat.errors import ConfigError, suggest
from mlxchat.store.naming import PINS, links
from mlxchat.store.store import Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def main(arguments: list[str]) -> int:
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
