"""mlxchat show: everything about one artifact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, take_names
from mlxchat.commands.columns import aligned, print_json, show_value, when
from mlxchat.config.wording import format_bytes, format_count, format_number, format_seconds
from mlxchat.errors import ConfigError
from mlxchat.store.comparing import flatten
from mlxchat.store.naming import LATEST, groups, latest, links
from mlxchat.store.store import Manifest, Store, read_manifest

EXAMPLES = ("wrong", "right", "all")


def main(arguments: list[str]) -> int:
    """Print an artifact's manifest for people, or with --json as it is; or an evaluation's examples, or RL's."""
    parser = make_naming_parser("show", "Show everything about an artifact.")
    parser.add_argument("--json", action="store_true", help="the manifest as it is")
    parser.add_argument(
        "--examples",
        nargs="?",
        choices=EXAMPLES,
        const="all",
        help="of an evaluation or RL: questions and answers",
    )
    parser.add_argument("-n", type=int, default=5, metavar="N", help="examples at most, of RL questions (default: 5)")
    parser.add_argument("--task", metavar="NAME", help="of an evaluation: examples of this task only")
    parser.add_argument("--iteration", type=int, metavar="N", help="of RL: answers of this iteration only")
    options = parser.parse_intermixed_args(arguments)
    if options.n < 1:
        raise ConfigError(f"-n is {options.n}, expected at least 1")
    (name,), settings = take_names(options.settings, "show", 1, 1, "ID")
    store = Store(outputs_folder(settings))
    place = store.resolve(name)
    if options.examples is not None:
        from mlxchat.commands.show_examples import show_examples  # which needs a reader of parquet
        from mlxchat.commands.show_rollouts import show_rollouts
        from mlxchat.evals.examples import has_rollouts

        if has_rollouts(place):
            return show_rollouts(place, which=options.examples, count=options.n, iteration=options.iteration)
        return show_examples(place, which=options.examples, count=options.n, task=options.task)
    manifest = read_manifest(place)
    if options.json:
        print_json(manifest)
        return 0
    print(place.name)
    print(aligned(_facts(store, place, manifest), indent="  "))
    for title, rows in _sections(manifest):
        if rows:
            print(f"{title}\n{aligned(rows, indent='  ')}")
    return 0


def _facts(store: Store, place: Path, manifest: Manifest) -> Iterator[list[str]]:
    yield ["id", manifest["rid"]]
    yield ["step", f"{manifest['step']} (stage {manifest['stage']}, version {manifest['version']})"]
    hosts = sorted({str(attempt.get("host")) for attempt in manifest.get("attempts", ()) if attempt.get("host")})
    attempts = len(manifest.get("attempts", ()))
    made = f"{when(manifest['published'])} in {format_seconds(manifest['seconds'] or 0)}"
    yield [
        "made",
        made + (f" ({attempts} attempts)" if attempts > 1 else "") + (f" on {', '.join(hosts)}" if hosts else ""),
    ]
    yield ["run", str(manifest.get("run"))]
    if manifest.get("overrides"):
        yield ["settings", " ".join(manifest["overrides"])]
    yield ["size", format_bytes(sum(file["bytes"] for file in manifest["outputs"]))]
    yield ["folder", str(place)]
    if manifest.get("tokens_per_second"):
        yield ["speed", f"{format_count(manifest['tokens_per_second'])} tok/s"]
    if manifest.get("peak_memory_bytes"):
        yield ["memory", _memory(manifest)]
    newest = latest(store)
    named = [f"{LATEST}/{name}" for name, one in links(store, newest).items() if one == place]
    named += [f"{group}/{name}" for group in groups(store) for name, one in links(store, group).items() if one == place]
    if named:
        yield ["named", ", ".join(named)]


def _memory(manifest: Manifest) -> str:
    """Return the peak of MLX's arrays, which progress shows and plans predict, and that of the whole process."""
    process, arrays = format_bytes(manifest["peak_memory_bytes"]), manifest.get("peak_array_bytes")
    if arrays is None:
        return f"{process} at most, the whole process"
    predicted = (manifest.get("derived") or {}).get("predicted_peak_bytes")
    known = f", {format_bytes(predicted)} predicted" if predicted else ""
    return f"{format_bytes(arrays)} of arrays at most{known}; {process} with the program and its libraries"


def _sections(manifest: Manifest) -> Iterator[tuple[str, list[list[str]]]]:
    yield "inputs", [[role, str(made.get("artifact"))] for role, made in (manifest.get("inputs") or {}).items()]
    yield "metrics", [[key, format_number(value)] for key, value in manifest["metrics"].items()]
    yield "derived", [[key, show_value(value)] for key, value in flatten(manifest.get("derived") or {}).items()]
    yield "config", [[key, show_value(value)] for key, value in flatten(manifest["config"]).items()]
    outside = [
        [
            str(item.get("name") or item.get("url")),
            str(item.get("revision") or item.get("version") or ""),
            str(item.get("sha256") or "")[:12],
        ]
        for item in manifest.get("externals") or ()
    ]
    yield "from outside", outside
    git, device = manifest.get("git") or {}, manifest.get("device") or {}
    commit = [["git", f"{str(git.get('commit'))[:12]}{' (changed since)' if git.get('dirty') else ''}"]] if git else []
    if ranks := (manifest.get("excluded") or {}).get("ranks"):
        hosts = ", ".join(dict.fromkeys(ranks.get("hosts", ())))
        commit.append(["ranks", f"{ranks.get('size')} ({ranks.get('backend')}) on {hosts}"])
    versions = [[key, str(value)] for key, value in (manifest.get("versions") or {}).items()]
    yield "made with", [*commit, *([["device", str(device.get("name"))]] if device else []), *versions]
    yield "files", [[file["path"], format_bytes(file["bytes"]), file["sha256"][:12]] for file in manifest["outputs"]]
