"""mlxchat data ls: what is on this machine of the Hub and of plain downloads, and who needs it."""

from __future__ import annotations

from mlxchat.commands.arguments import make_parser, outputs_folder
from mlxchat.commands.columns import aligned, print_json
from mlxchat.config.wording import format_bytes
from mlxchat.hub.cache import cache_folder, hub_cache
from mlxchat.hub.inventory import Holding, find_holdings

_NEEDED_SHOWN = 2


def main(arguments: list[str]) -> int:
    """Print a line for each repository and download."""
    parser = make_parser("data ls", "List what was fetched: files, size, revision, and the artifacts made from it.")
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options = parser.parse_intermixed_args(arguments)
    outputs = outputs_folder(options.settings)
    holdings = find_holdings(outputs)
    total = sum(holding.bytes + holding.part_bytes for holding in holdings)
    if options.json:
        print_json({"hub_cache": str(hub_cache()), "cache": str(cache_folder()), "bytes": total,
                    "holdings": [_describe(holding) for holding in holdings]})  # fmt: skip
        return 0
    if not holdings:
        print(f"nothing was fetched yet: {hub_cache()} and {cache_folder()} hold nothing of ours")
        return 0
    rows = [["NAME", "REVISION", "FILES", "SIZE", "NEEDED BY"]]
    for holding in holdings:
        files = f"{len(holding.files)} of {len(holding.listed)}" if holding.kind != "url" else "1"
        size = format_bytes(holding.bytes)
        if holding.part_bytes:
            size += f" + {format_bytes(holding.part_bytes)} of files that are not whole"
        more = len(holding.needed_by) - _NEEDED_SHOWN
        needed = ", ".join(holding.needed_by[:_NEEDED_SHOWN]) + (f" and {more} more" if more > 0 else "")
        rows.append([holding.name, (holding.revision or "")[:12] or "-", files, size, needed or "-"])
    print(aligned(rows, right=(2, 3)))
    print(f"{format_bytes(total)} in {hub_cache()} and {cache_folder()}. To remove: mlxchat data rm NAME")
    return 0


def _describe(holding: Holding) -> dict[str, object]:
    return {
        "name": holding.name, "kind": holding.kind, "revision": holding.revision, "files": len(holding.files) or 1,
        "files_listed": len(holding.listed) or 1, "bytes": holding.bytes, "part_bytes": holding.part_bytes,
        "verified": all(file.is_there() for file in holding.files), "needed_by": holding.needed_by,
    }  # fmt: skip
