"""Verbs about results of runs: compare and report."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser, amount, print_json, show_value
from mlxchat.config.wording import Table, format_number, plural
from mlxchat.errors import ConfigError, visible
from mlxchat.store.naming import LATEST, Found, called, latest, links, meaning
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from mlxchat.report.collect import RunReport
    from mlxchat.report.experiments import Verdict
    from mlxchat.store.compare import Table as Runs

_WIDEST_CELL = 24
_SWEEPS = "RUN may also be the folder of a sweep or search in multirun/."


def compare(parser: Parser) -> None:
    parser.take_names("[RUN…]", least=0, most=None, about=f"{_SWEEPS} Without any: all runs")
    parser.description = "Compare runs, or jobs of a sweep: rows of settings and metrics that differ, columns of runs."
    add = parser.add_argument
    add("--sort", metavar="NAME", help="by a setting (smallest first) or metric (best first); --sort=-NAME reverses")
    formats = "csv and json: all metrics; tsv: autoresearch's journal of a --baseline"
    add("--format", choices=("table", "csv", "json", "tsv"), default="table", help=formats)
    _add_baseline(parser)


def _add_baseline(parser: Parser) -> None:
    """Declare the options of a verb that judges experiments."""
    judge = "judge the experiments since RUN: runs that differ in their seeds only are one, called by name=NAME"
    parser.add_argument("--baseline", metavar="RUN", help=judge)
    parser.add_argument("--metric", default="pretrain.val_bpb", metavar="STEP.METRIC", help="of --baseline")


def _judge(options: Namespace) -> list[Verdict]:
    """Return the verdicts on the named runs, or on all, with those of --baseline."""
    from mlxchat.report.experiments import find_experiments, judge
    from mlxchat.runner.stage import best_of
    from mlxchat.store.compare import find_runs

    store = Store(options.outputs)
    plans = find_runs(store, [options.baseline, *options.names] if options.names else [])
    found = find_experiments(store, plans, options.metric)
    stage = next(made["stage"] for each in found for made in each.made)
    better = best_of(stage, options.metric.rpartition(".")[2])
    if better is None:
        raise ConfigError(f"--metric {options.metric}: stage {stage} does not say which values are better")
    return judge(found, options.baseline, less_is_better=better is min)


def _compare(options: Namespace) -> int:
    """Print the table."""
    from mlxchat.runner.stage import best_of
    from mlxchat.store.compare import find_runs, make_table, rows_of_runs

    if options.baseline is not None:
        _print_verdicts(options)
        return 0
    if options.format == "tsv":
        raise ConfigError("--format tsv needs --baseline RUN")
    names, store = options.names, Store(options.outputs)
    rows = rows_of_runs(store, find_runs(store, names))
    if not rows and names:
        raise ConfigError(f"no job of {', '.join(names)} has artifacts in {store.outputs}")
    if not rows:
        print(store.lacking("runs"))
        return 0
    table = make_table(rows, options.sort, best_of)
    equal = table.equal if options.format == "table" else []
    table = replace(table, metrics=[name for name in table.metrics if name not in equal])
    _print(table, options.format, {row["name"]: _errors_of(store, row["scores"]) for row in rows})
    if equal:
        steps = ", ".join(dict.fromkeys(name.partition(".")[0] for name in equal))
        print(f"\nnot shown: {plural(len(equal), 'metric')} without a difference ({steps}); --format csv has all")
    return 0


def _print_verdicts(options: Namespace) -> None:
    """Print the verdicts on experiments."""
    from mlxchat.report.experiments import describe_verdicts, journal, table_of_verdicts

    verdicts = _judge(options)
    if options.format == "json":
        print_json(describe_verdicts(verdicts, options.metric))
    elif options.format in ("csv", "tsv"):
        _print_csv(journal(verdicts), "\t" if options.format == "tsv" else ",")
    else:
        print(table_of_verdicts(verdicts, options.metric).text())


def _print_csv(rows: Iterable[Iterable[Any]], delimiter: str = ",") -> None:
    writer = csv.writer(sys.stdout, delimiter=delimiter, lineterminator="\n")
    writer.writerows([visible(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)


def _errors_of(store: Store, scores: dict[str, str]) -> dict[str, float]:
    """Return column → standard error, of the evaluations by what their columns' names begin with."""
    from mlxchat.evals.scores import errors_of, read_scores

    errors: dict[str, float] = {}
    for start, name in scores.items():
        with suppress(OSError, ValueError):  # an artifact without scores, or damaged ones
            raw = json.loads((store.outputs / "store" / name / "scores.json").read_text(encoding="utf-8"))
            errors |= {f"{start}{metric}": error for metric, error in errors_of(read_scores(raw)).items()}
    return errors


def _print(runs: Runs, form: str, errors: dict[str, dict[str, float]]) -> None:
    """Print the runs as JSON or CSV, or a column for each run with a row for each setting and metric."""
    names = ["name", *runs.settings, *runs.metrics]
    if form == "json":
        print_json(runs.rows)
    elif form == "csv":
        _print_csv([names, *([row.get(name) for name in names] for row in runs.rows)])
    else:
        heads = [str(row["name"]) for row in runs.rows]
        short = [called(head) for head in heads]
        header = ["", *(short if len({*short}) == len(short) else heads)]
        rows = [[name, *(_cell(row, name, errors) for row in runs.rows)] for name in names[1:]]
        print(Table(header=header, align="l" + "r" * len(heads), rows=rows).text())


def _cell(row: Mapping[str, Any], name: str, errors: Mapping[str, Mapping[str, float]]) -> str:
    value, error = row.get(name), errors.get(row["name"], {}).get(name)
    if value is None:
        return "-"
    text = format_number(value) if isinstance(value, int | float) and not isinstance(value, bool) else show_value(value)
    text = text if error is None else f"{text} ± {error:.2g}"
    return text if len(text) <= _WIDEST_CELL else f"{text[: _WIDEST_CELL - 1]}…"


def report(parser: Parser) -> None:
    parser.take_names("[RUN|ID]", least=0, most=None, about=f"{_SWEEPS} Default: the latest run")
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="folder for report.html, report.md and plots")
    add("--cost-per-hour", type=amount, metavar="DOLLARS", help="cost of this machine")
    add("--open", action="store_true", help="open it in a browser")
    _add_baseline(parser)


def _report(options: Namespace) -> int:
    """Write a report; print its summary and path."""
    from mlxchat.report.comparison import comparison, reports_of_sweep
    from mlxchat.report.document import document, title_of, write_document
    from mlxchat.report.plots import slug

    name, out = next(iter(options.names), LATEST), Path(options.out) if options.out else None
    if options.baseline is not None:
        from mlxchat.report.experiments import report_experiments

        place = out or Store(options.outputs).outputs / "reports" / f"since-{slug(options.baseline)}"
        title = f"Experiments since {options.baseline}"
        return _show(write_document(place, title, report_experiments(_judge(options), options.metric)), options)
    if len(options.names) > 1:
        raise ConfigError("a report is of one run or sweep; with --baseline RUN it is of experiments")
    if sweep := _sweep_folder(options.outputs, name):
        title, reports = called(sweep.name), reports_of_sweep(options.outputs, sweep)
    else:
        reports = [_report_of(Store(options.outputs), name)]
        title = title_of(reports[0])
    if options.cost_per_hour is not None:
        reports = [replace(each, cost_per_hour=options.cost_per_hour) for each in reports]
    blocks = comparison(sweep, reports) if sweep else document(reports[0])
    place = write_document(out or reports[0].folder, title, blocks)
    if not sweep:
        from mlxchat.report.summary import print_summary

        print_summary(reports[0])
    return _show(place, options)


def _show(place: Path, options: Namespace) -> int:
    """Print the path of a report, and open it if that is wanted."""
    print(f"report: {place}")
    if options.open:
        import webbrowser

        if not webbrowser.open(place.resolve().as_uri()):
            print("there is no browser to show it in: open the file yourself")
    return 0


def _report_of(store: Store, name: str) -> RunReport:
    """Return the report of a run, or of an artifact with all that it was made from."""
    from mlxchat.report.collect import collect, collect_steps, entries_of_artifacts, latest_run

    if name == LATEST and not latest(store):
        return collect(store.outputs, latest_run(store.outputs))  # it has no finished step yet
    found = meaning(store, _last_part(name))
    if isinstance(found, Found):
        places, title = [found.place], found.place.name
    elif ((run := store.outputs / "runs" / found.name) / "plan.json").exists():
        return collect(store.outputs, run)
    else:  # pulled from elsewhere, without its record
        places, title = list(links(store, found.name).values()), found.name
    entries = entries_of_artifacts(store.outputs, places)
    return collect_steps(store.outputs, title, entries, store.outputs / "reports" / title)


def _last_part(name: str) -> str:
    """Return the last part of a path, since a run may be given by its folder."""
    return name.rstrip("/").rpartition("/")[2] if "runs/" in name or "multirun/" in name else name


def _sweep_folder(outputs: Path, name: str) -> Path | None:
    """Return the folder of a sweep; None: a run is called so, or nothing is."""
    from mlxchat.store.compare import find_sweep

    last = _last_part(name)
    is_run = any(last in (run.name, called(run.name)) for run in (outputs / "runs").glob("*"))
    return None if is_run and "multirun/" not in name else find_sweep(outputs, last)
