"""Verbs about results of runs: compare and report."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser, amount
from mlxchat.commands.columns import aligned, print_json, show_value
from mlxchat.config.wording import format_number, plural
from mlxchat.errors import ConfigError, visible
from mlxchat.store.naming import LATEST, Found, called, latest, links, meaning
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.report.collect import RunReport
    from mlxchat.store.compare import Table

_WIDEST_HEAD = 24
_WIDEST_CELL = 24


_SWEEPS = "RUN may also be the folder of a sweep or search in multirun/."


def compare(parser: Parser) -> None:
    """Declare `mlxchat compare`."""
    parser.take_names("[RUN…]", least=0, most=None, about=f"{_SWEEPS} Without any: all runs")
    parser.description = (
        "Compare runs, or the jobs of a sweep or search: a row for each setting and metric that differs, a column for "
        "each run."
    )
    add = parser.add_argument
    add("--sort", metavar="NAME", help="by a setting (smallest first) or metric (best first); --sort=-NAME reverses")
    add("--format", choices=("table", "csv", "json", "md"), default="table", help="csv and json: all metrics")
    parser.set_defaults(main=_compare)


def _compare(options: Namespace) -> int:
    """Print the table."""
    from mlxchat.runner.stage import best_of
    from mlxchat.store.compare import find_runs, make_table, rows_of_runs

    names, store = options.names, Store(options.outputs)
    rows = rows_of_runs(store, find_runs(store, names))
    if not rows and not names:
        print(store.lacking("runs"))
        return 0
    if not rows:
        raise ConfigError(f"no job of {', '.join(names)} has artifacts in {store.outputs}")
    table = make_table(rows, options.sort, best_of)
    equal = table.equal if options.format in ("table", "md") else []
    table = replace(table, metrics=[name for name in table.metrics if name not in equal])
    _print(table, options.format, {row["name"]: _errors_of(store, row["scores"]) for row in rows})
    if equal:
        steps = ", ".join(dict.fromkeys(name.partition(".")[0] for name in equal))
        print(f"\nnot shown: {plural(len(equal), 'metric')} without a difference ({steps}); --format csv has all")
    return 0


def _errors_of(store: Store, scores: dict[str, str]) -> dict[str, float]:
    """Return column → standard error, of the evaluations by what their columns' names begin with."""
    from mlxchat.evals.scores import errors_of, read_scores

    errors: dict[str, float] = {}
    for start, name in scores.items():
        with suppress(OSError, ValueError):  # an artifact without scores, or damaged ones
            raw = json.loads((store.outputs / "store" / name / "scores.json").read_text(encoding="utf-8"))
            errors |= {f"{start}{metric}": error for metric, error in errors_of(read_scores(raw)).items()}
    return errors


def _print(table: Table, form: str, errors: dict[str, dict[str, float]]) -> None:
    names = [*table.settings, *table.metrics]
    if form == "json":
        print_json(table.rows)
    elif form == "csv":
        import csv

        writer = csv.DictWriter(sys.stdout, ["name", *names], lineterminator="\n")
        writer.writerow({name: visible(name) for name in ["name", *names]})
        writer.writerows(
            {key: visible(value) if isinstance(value, str) else value for key, value in row.items()}
            for row in table.rows
        )
    elif form == "md":
        cells = [[name, *(_cell(row, name, errors) for row in table.rows)] for name in ["name", *names]]
        lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
        print(visible("\n".join(f"| {' | '.join(line)} |" for line in lines)))
    else:
        _print_columns(table, names, errors)


def _print_columns(table: Table, names: list[str], errors: dict[str, dict[str, float]]) -> None:
    """Print a line for each setting and metric; as many runs beside each other as the terminal is wide."""
    heads = _heads([str(row["name"]) for row in table.rows])
    if max(map(len, heads)) > _WIDEST_HEAD:
        for number, head in enumerate(heads, start=1):
            print(f"{number:>{len(str(len(heads)))}}  {visible(head)}")
        print()
        heads = [str(number) for number in range(1, len(heads) + 1)]
    cells = [[_shortened(_cell(row, name, errors)) for name in names] for row in table.rows]
    widths = [2 + max(map(len, [head, *column])) for head, column in zip(heads, cells, strict=True)]
    # Piped output is one table, for grep.
    room = shutil.get_terminal_size((sys.maxsize, 0)).columns - max(map(len, names), default=0)
    start = 0
    while start < len(heads):
        end = start + 1
        while end < len(heads) and sum(widths[start : end + 1]) <= room:
            end += 1
        lines = [["", *heads[start:end]]]
        lines += [[name, *(column[place] for column in cells[start:end])] for place, name in enumerate(names)]
        print(("\n" if start else "") + aligned(lines, right=range(1, end - start + 1)))
        start = end


def _heads(names: list[str]) -> list[str]:
    """Return the last parts of the names of runs, if they differ."""
    heads = [called(name) for name in names]
    return heads if len({*heads}) == len(heads) else names


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDEST_CELL else f"{text[: _WIDEST_CELL - 1]}…"


def _cell(row: Mapping[str, Any], name: str, errors: Mapping[str, Mapping[str, float]] = {}) -> str:
    value, error = row.get(name), errors.get(row["name"], {}).get(name)
    if value is None:
        return "-"
    text = format_number(value) if isinstance(value, int | float) and not isinstance(value, bool) else show_value(value)
    return text if error is None else f"{text} ± {error:.2g}"


def report(parser: Parser) -> None:
    """Declare `mlxchat report`."""
    parser.take_names("[RUN|ID]", least=0, about=f"{_SWEEPS} Default: the latest run")
    add = parser.add_argument
    add("--out", metavar="PLACE", help="folder for report.html, report.md and plots, or FILE.html")
    add("--cost-per-hour", type=amount, metavar="DOLLARS", help="cost of this machine")
    add("--open", action="store_true", help="open it in a browser")
    parser.set_defaults(main=_report)


def _report(options: Namespace) -> int:
    """Write a report; print its summary and path."""
    from mlxchat.report.comparison import comparison, reports_of_sweep
    from mlxchat.report.document import document, title_of, write_document, write_page

    name, out = next(iter(options.names), LATEST), Path(options.out) if options.out else None
    if sweep := _sweep_folder(options.outputs, name):
        title, (reports, titles) = called(sweep.name), reports_of_sweep(options.outputs, sweep)
    else:
        reports, titles = [_report_of(Store(options.outputs), name)], []
        title = title_of(reports[0])
    if options.cost_per_hour is not None:
        reports = [replace(each, cost_per_hour=options.cost_per_hour) for each in reports]
    blocks = comparison(sweep, reports, titles) if sweep else document(reports[0])
    if out is not None and out.suffix == ".html":
        place = write_page(out, title, blocks)
    else:
        place = write_document(out or reports[0].folder, title, blocks)
    if not sweep:
        from rich.console import Console

        from mlxchat.report.summary import print_summary

        print_summary(reports[0], Console())
    print(f"report: {place}")
    if options.open:
        import webbrowser

        if not webbrowser.open(place.resolve().as_uri()):
            print("there is no browser to show it in: open the file yourself")
    return 0


def _report_of(store: Store, name: str) -> RunReport:
    """Return the report of a run, or of an artifact with all that it was made from.

    Raises:
        StoreError: nothing, or more than one thing, has this name.
    """
    from mlxchat.report.collect import collect, collect_steps, entries_of_artifacts, latest_run

    if name == LATEST and not latest(store):
        return collect(store.outputs, latest_run(store.outputs))  # it has no finished step yet
    found = meaning(store, _folder_name(name))
    if isinstance(found, Found):
        places, title = [found.place], found.place.name
    elif ((run := store.outputs / "runs" / found.name) / "plan.json").exists():
        return collect(store.outputs, run)
    else:  # pulled from elsewhere, without its record
        places, title = list(links(store, found.name).values()), found.name
    entries = entries_of_artifacts(store.outputs, places)
    return collect_steps(store.outputs, title, entries, store.outputs / "reports" / title)


def _folder_name(name: str) -> str:
    """Return the last part of a path, since a run may be given by its folder."""
    return name.rstrip("/").rpartition("/")[2] if "runs/" in name or "multirun/" in name else name


def _sweep_folder(outputs: Path, name: str) -> Path | None:
    from mlxchat.store.compare import find_runs, find_sweep

    folder = find_sweep(outputs, _folder_name(name))
    if folder is None or not (folder / "sweep.json").is_file():
        return None
    is_run = any((outputs / "runs" / run).is_dir() for run, _ in find_runs(Store(outputs), [name]))
    return None if is_run else folder
