"""mlxchat report: write and print the report of a run."""

from __future__ import annotations

from pathlib import Path

from mlxchat.commands.arguments import make_parser, outputs_folder


def main(arguments: list[str]) -> int:
    """Write the latest run's report anew and print its summary."""
    parser = make_parser("report", "Write and print the report of the latest run.")
    parser.add_argument("--run", help="name of a folder under outputs/runs (default: the latest)")
    options = parser.parse_intermixed_args(arguments)
    outputs = outputs_folder(options.settings)
    from mlxchat.report import latest_run

    show_report(outputs, outputs / "runs" / options.run if options.run else latest_run(outputs))
    return 0


def show_report(outputs: Path, run: Path) -> None:
    """Write report.md and report.html into the run's folder and print a summary."""
    from rich.console import Console

    from mlxchat.report import collect, print_summary, write_report

    place = write_report(outputs, run)
    print_summary(collect(outputs, run), Console())
    print(f"report: {place}")
