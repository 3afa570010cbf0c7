"""mlxchat gc: show, or remove, what nothing refers to."""

from __future__ import annotations

from mlxchat.commands.arguments import make_parser, outputs_folder
from mlxchat.commands.columns import aligned, print_json
from mlxchat.config.wording import format_bytes
from mlxchat.errors import ConfigError
from mlxchat.store.gc import Collection, collect, find_garbage
from mlxchat.store.leftovers import Limits, parse_age, parse_bytes
from mlxchat.store.store import Store


def main(arguments: list[str]) -> int:
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
        _show(found, options.apply, store, limits)
    return 0


def _show(found: Collection, applied: bool, store: Store, limits: Limits) -> None:
    listed = [item for item in found.garbage if item.kind not in ("index", "ref")]
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
        print(f"and {links} names or index entries that lead to nothing")
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
