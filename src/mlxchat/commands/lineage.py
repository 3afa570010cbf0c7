"""mlxchat lineage: what an artifact was made from, and what was made from it."""

from __future__ import annotations

from collections.abc import Iterator

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.commands.columns import print_json
from mlxchat.errors import visible
from mlxchat.store.catalog import read_catalog
from mlxchat.store.lineage import Node, ancestors, descendants, index
from mlxchat.store.store import Store, read_manifest


def main(arguments: list[str]) -> int:
    """Print both trees, or with --up or --down one of them."""
    parser = make_naming_parser("lineage", "Show what an artifact was made from, and what was made from it.")
    parser.add_argument("--up", action="store_true", help="only what it was made from")
    parser.add_argument("--down", action="store_true", help="only what was made from it")
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options = parser.parse_intermixed_args(arguments)
    (name,), settings = take_names(options.settings, "lineage", 1, 1, "ID")
    store = Store(outputs_folder(settings))
    place = store.resolve(name)
    manifest = read_manifest(place)
    known = index(read_catalog(store)) if manifest["kind"] != "tokens" else {}
    if manifest["rid"] not in known:
        from mlxchat.store.catalog import short_form

        known[manifest["rid"]] = short_form(place.name, manifest)
    trees = {}
    if options.up or not options.down:
        trees["inputs"] = ancestors(manifest["rid"], known)
    if options.down or not options.up:
        trees["uses"] = descendants(manifest["rid"], known)
    if options.json:
        print_json(trees)
        return 0
    titles = {"inputs": "made from", "uses": "used by"}
    for key, tree in trees.items():
        print(titles[key] if tree[key] else f"{titles[key]} nothing: {visible(tree['artifact'])}")
        if tree[key]:
            print("\n".join(f"  {visible(line)}" for line in draw(tree, key)))
    return 0


def draw(tree: Node, below: str) -> list[str]:
    """Return a tree's lines. What stands at several places is followed at the first."""
    seen: set[str] = set()

    def lines(node: Node, before: str, branch: str, further: str) -> Iterator[str]:
        again = node["rid"] in seen and node[below]
        seen.add(node["rid"])
        role = f"{node['role']}: " if node["role"] else ""
        note = "" if node["here"] else "  (no longer in the store)"
        step = f"  [{node['step']}]" if node["step"] else ""
        yield f"{before}{branch}{role}{node['artifact']}{step}{note}{'  (see above)' if again else ''}"
        if again:
            return
        for position, child in enumerate(node[below]):
            last = position == len(node[below]) - 1
            yield from lines(child, before + further, "└─ " if last else "├─ ", "   " if last else "│  ")

    return list(lines(tree, "", "", ""))
