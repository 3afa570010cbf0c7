"""mlxchat report: write and print the report of a run, of artifacts with their lineage, or of several runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from mlxchat.commands.arguments import make_naming_parser, outputs_folder, split_words
from mlxchat.errors import ConfigError
from mlxchat.report.collect import RunReport, collect, collect_steps, entries_of_artifacts, latest_run
from mlxchat.store.naming import LATEST, Found, latest, links, meaning
from mlxchat.store.store import Store


def main(arguments: list[str]) -> int:
    """Write a report, print its summary and where it is."""
    parser = make_naming_parser(
        "report", "Write and print the report of a run (the latest), of artifacts, or of several runs.", "RUN|ID"
    )
    parser.epilog = "RUN may also be a sweep's folder in multirun/. Several runs: side by side. " + (
        parser.epilog or ""
    )
    parser.add_argument("--run", help="name of a folder under outputs/runs (the same as RUN)")
    parser.add_argument("--out", metavar="PLACE", help="a folder for report.html, report.md and pictures, or FILE.html")
    parser.add_argument("--cost-per-hour", type=float, metavar="DOLLARS", help="what this machine costs")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    options = parser.parse_intermixed_args(arguments)
    names, settings = split_words(options.settings)
    outputs = outputs_folder(settings)
    names += [options.run] if options.run else []
    title, reports, titles = _reports(outputs, names)
    if options.cost_per_hour is not None:
        reports = [replace(report, cost_per_hour=options.cost_per_hour) for report in reports]
    place = _write(title, reports, titles, Path(options.out) if options.out else None)
    print(f"report: {place}")
    if options.open:
        import webbrowser

        if not webbrowser.open(place.resolve().as_uri()):
            print("there is no browser to show it in: open the file yourself")
    return 0


def _write(title: str, reports: list[RunReport], titles: list[str], out: Path | None) -> Path:
    """Write the report of one run, or the comparison of several; print the summary of one."""
    from mlxchat.report.comparison import render_comparison, write_comparison
    from mlxchat.report.writing import write_collected, write_page

    folder = out or reports[0].folder
    if len(reports) > 1:
        if out is not None and out.suffix == ".html":
            return write_page(out, render_comparison(title, reports, titles))
        return write_comparison(folder, title, reports, titles)
    from rich.console import Console

    from mlxchat.report.html import render_html
    from mlxchat.report.terminal import print_summary

    (report,) = reports
    if out is not None and out.suffix == ".html":
        place = write_page(out, render_html(report))
    else:
        place = write_collected(report, folder)
    print_summary(report, Console())
    return place


def _reports(outputs: Path, names: list[str]) -> tuple[str, list[RunReport], list[str]]:
    """Return a title, the reports that the names mean, and what each is called beside the others.

    Raises:
        ConfigError: runs and artifacts are mixed.
        StoreError: a name is that of nothing, or there is no run at all.
    """
    sweeps = {name: folder for name in names if (folder := _sweep_folder(outputs, name))}
    if sweeps and len(names) == 1:
        return _reports_of_sweep(outputs, sweeps[names[0]])
    meant = [_meaning(Store(outputs), name) for name in names or [LATEST] if name not in sweeps]
    folders = [each for each in meant if isinstance(each, Path)]
    places = [place for each in meant if not isinstance(each, Path) for place in each]
    if (folders or sweeps) and places:
        run = [*folders, *sweeps.values()][0].name
        raise ConfigError(f"a report is of runs or of artifacts; got the run {run} and the artifact {places[0].name}")
    if places:
        entries = entries_of_artifacts(outputs, places)
        title = ", ".join(place.name for place in places) if names else latest(Store(outputs))
        folder = outputs / "reports" / "+".join(place.name for place in places)[:120]
        return title, [collect_steps(outputs, title, entries, folder)], []
    folders = list(dict.fromkeys(folders))
    reports = [collect(outputs, folder) for folder in folders]
    short = [report.experiment or report.name for report in reports]
    titles = [s if short.count(s) == 1 else report.name for s, report in zip(short, reports, strict=True)]
    for sweep in sweeps.values():
        _, jobs, names_of_jobs = _reports_of_sweep(outputs, sweep)
        reports, titles = reports + jobs, titles + names_of_jobs
    if len(reports) > 1:
        there = outputs / "reports" / "+".join(folder.name for folder in [*folders, *sweeps.values()])[:120]
        reports = [replace(report, folder=there) for report in reports]
    return " and ".join(titles) if len(titles) < 4 else f"{len(titles)} runs", reports, titles


def _meaning(store: Store, name: str) -> Path | list[Path]:
    """Return the folder of the run that a name means, or the artifacts.

    Raises:
        StoreError: nothing, or more than one thing, has this name.
    """
    if name == LATEST and not latest(store):
        return latest_run(store.outputs)  # it has not finished a step yet
    found = meaning(store, _folder_name(name))
    if isinstance(found, Found):
        return [found.place]
    folder = store.outputs / "runs" / found.name
    return folder if (folder / "plan.json").exists() else list(links(store, found.name).values())


def _folder_name(name: str) -> str:
    """Return the last part of a path, since a run may be named by its folder."""
    return name.rstrip("/").rpartition("/")[2] if "runs/" in name or "multirun/" in name else name


def _sweep_folder(outputs: Path, name: str) -> Path | None:
    from mlxchat.runner.table import find_runs

    folder = outputs / "multirun" / _folder_name(name)
    if not os.path.isfile(folder / "sweep.json"):  # noqa: PTH113  (False for names that are too long for a file)
        return None
    is_run = any((outputs / "runs" / run.name).is_dir() for run in find_runs(Store(outputs), [name]))
    return None if is_run else folder


def _reports_of_sweep(outputs: Path, folder: Path) -> tuple[str, list[RunReport], list[str]]:
    state = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    jobs = [job for job in state["jobs"].values() if job.get("steps")]
    if not jobs:
        raise ConfigError(f"{folder}: no job of it has artifacts")
    titles = [job["title"] for job in jobs]
    reports = [collect_steps(outputs, job["title"], job["steps"], folder) for job in jobs]
    return f"{'Search' if (folder / 'trials.jsonl').exists() else 'Sweep'} {folder.name}", reports, titles
