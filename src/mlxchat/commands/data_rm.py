"""mlxchat data rm: remove what was fetched, unless an artifact here was made from it or somebody is fetching it."""

from __future__ import annotations

from mlxchat.commands.arguments import Parser, take_names
from mlxchat.commands.arguments import outputs_folder as folder_of
from mlxchat.config.wording import format_bytes
from mlxchat.errors import DataError
from mlxchat.hub.inventory import choose, find_holdings, remove


def main(arguments: list[str]) -> int:
    """Remove what is named; return 1 if some of it stays."""
    parser = Parser(
        prog="mlxchat data rm", allow_abbrev=False,
        description="Remove repositories of the Hub and downloads from this machine. What an artifact was made from "
        "stays unless --force is given; it can be fetched again.",
    )  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="NAME", help="repository[@commit], address; outputs=PATH")
    parser.add_argument("--force", action="store_true", help="also what artifacts were made from")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and change nothing")
    options = parser.parse_intermixed_args(arguments)
    names, settings = take_names(options.settings, "data rm", 1, None, "NAME…")
    holdings = find_holdings(folder_of(settings))
    chosen = list({holding.title: holding for name in names for holding in choose(holdings, name)}.values())
    needed = [holding for holding in chosen if holding.needed_by]
    if needed and not options.force and not options.dry_run:
        lines = [f"  {holding.title}: {', '.join(holding.needed_by[:3])}" for holding in needed]
        raise DataError(
            "Artifacts were made from this, and a step that reads it again would have to fetch it anew:\n"
            + "\n".join(lines)
            + "\nNothing was removed. To remove it all the same: --force"
        )
    stays: list[str] = []
    for holding in chosen:
        if options.dry_run:
            size = format_bytes(holding.bytes + holding.part_bytes)
            print(f"would remove {holding.title} ({size}){'; needed by ' * bool(holding.needed_by)}"
                  f"{', '.join(holding.needed_by[:3])}")  # fmt: skip
            continue
        freed, kept = remove(holding)
        stays += kept
        print(f"removed {holding.title} ({format_bytes(freed)})")
        for name in kept:
            print(f"  {name} stays: another process is fetching it")
    return int(bool(stays))
