"""mlxchat ls: the artifacts."""

from __future__ import annotations

from contextlib import suppress

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, split_words
from mlxchat.commands.columns import aligned, print_json, when
from mlxchat.config.wording import format_bytes, format_number, format_seconds
from mlxchat.errors import ConfigError, StoreError, suggest
from mlxchat.store.catalog import Summary, read_catalog
from mlxchat.store.naming import Run, links, meaning
from mlxchat.store.store import Store

_ENCODED = "tokens"


def main(arguments: list[str]) -> int:
    """Print a line per artifact, the newest last."""
    parser = make_naming_parser("ls", "List the artifacts, the newest last; of a stage, a step or a run.", "NAME")
    parser.add_argument("--stage", action="append", default=[], help="only of this stage or step (repeatable)")
    parser.add_argument("--sort", metavar="METRIC", help="only artifacts that have this metric, the best first")
    parser.add_argument("--json", action="store_true", help="one JSON array for programs")
    options = parser.parse_intermixed_args(arguments)
    names, settings = split_words(options.settings)
    store = Store(outputs_folder(settings))
    found = read_catalog(store)
    wanted = [*options.stage, *names]
    known = {str(summary.get(key)) for summary in found for key in ("stage", "step") if summary.get(key)}
    of_runs: set[str] = set()
    for name in wanted:
        if name not in known and found:
            of_runs |= _of_run(store, name, known)

    def is_wanted(summary: Summary) -> bool:
        return bool({summary.get("stage"), summary.get("step")} & set(wanted)) or summary["folder"] in of_runs

    shown = [summary for summary in found if not wanted or is_wanted(summary)]
    if options.sort:
        shown = _sorted(shown, options.sort)
    if options.json:
        print_json(shown)
        return 0
    encoded = [summary for summary in shown if summary.get("kind") == _ENCODED]
    listed = shown if _ENCODED in wanted else [summary for summary in shown if summary.get("kind") != _ENCODED]
    if listed:
        print(aligned([_row(summary, options.sort) for summary in listed], right=(3, 4)))
    if encoded and listed is not shown:
        size = format_bytes(sum(summary["bytes"] for summary in encoded))
        print(
            f"and {len(encoded)} folders of encoded text, {_ENCODED}-* ({size}), which trainings and evaluations "
            "share, and make again if they are removed"
        )
    if not found:
        print(f"{store.outputs} holds no artifacts yet: run mlxchat first")
    return 0


def _of_run(store: Store, name: str, known: set[str]) -> set[str]:
    """Return the folders of a run's artifacts.

    Raises:
        ConfigError: there is no such run.
    """
    with suppress(StoreError):
        if isinstance(meant := meaning(store, name, paths=False), Run):
            return {place.name for place in links(store, meant.name).values()}
    raise ConfigError(f'"{name}" is no stage, step or run: {", ".join(sorted(known))}.{suggest(name, known)}')


def _sorted(summaries: list[Summary], metric: str) -> list[Summary]:
    """Return the artifacts that have a metric, the best first as their stage declares; names may be STEP.METRIC.

    Raises:
        ConfigError: none has it.
    """
    step, _, name = metric.rpartition(".")
    having = [one for one in summaries if name in (one.get("metrics") or {}) and step in ("", one["step"])]
    if not having:
        known = sorted({key for one in summaries for key in one.get("metrics") or {}})
        raise ConfigError(f'--sort: no artifact has "{metric}": {", ".join(known)}.{suggest(name, known)}')
    from mlxchat.runner.stage import best_of  # slow to import, and needed for this alone

    is_maximised = best_of(having[0]["stage"], name) is max
    return sorted(having, key=lambda one: float(one["metrics"][name]), reverse=is_maximised)


def _row(summary: Summary, metric: str | None = None) -> list[str]:
    if "damaged" in summary:
        return ["damaged         ", summary["folder"], "-", "-", "-", "its manifest cannot be read: see mlxchat verify"]
    shown = list(summary["metrics"].items())[:3]
    if metric:
        name = metric.rpartition(".")[2]
        shown = [(name, summary["metrics"][name])]
    numbers = [f"{key} {format_number(value)}" for key, value in shown]
    extended = summary["inputs"].get("extends")
    if extended:
        numbers.append(f"extends {extended['artifact']}")
    size, seconds = format_bytes(summary["bytes"]), format_seconds(summary["seconds"] or 0)
    return [when(summary["published"]), summary["folder"], str(summary["step"]), size, seconds, "  ".join(numbers)]
