"""The tables of the report, free of any output format.

A `Table` holds plain text; markdown.py, html.py and terminal.py escape and lay it out. Which rows there are
follows from the steps of the run alone. The table of metrics is in scorecard.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.sources import mapping, number, sequence, text
from mlxchat.report.wording import (
    ABSENT,
    computing_seconds,
    format_bytes,
    format_count,
    format_dollars,
    format_seconds,
    join,
)


@dataclass(frozen=True)
class Cell:
    """One entry: its text, a lesser remark beside it, and whether it is the best of its row."""

    text: str
    detail: str = ""
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under a header; `align` has one l or r per column."""

    header: list[str]
    align: str
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


def timing_table(report: RunReport) -> Table:
    """Return how long each step took, how fast it was, how much memory it used, and how it went."""
    priced = report.cost_per_hour is not None
    rows = []
    for step in report.steps:
        manifest = step.manifest
        cost = format_dollars(step.seconds, report.cost_per_hour)
        speed = number(manifest.get("tokens_per_second"))
        rows.append(
            [
                Cell(step.name),
                Cell(step.outcome),
                Cell(format_seconds(step.seconds)),
                *([Cell(cost or ABSENT)] if priced else []),
                Cell(format_count(speed)),
                Cell(format_bytes(number(manifest.get("peak_memory_bytes")))),
                Cell(*_attempts(step)),
            ]
        )
    total = [Cell("all steps"), Cell(""), Cell(format_seconds(computing_seconds(report)))]
    total += [Cell(format_dollars(computing_seconds(report), report.cost_per_hour))] if priced else []
    rows.append(total + [Cell("")] * 3)
    notes = [
        "Wall clock, over all attempts of a step. A cached step shows what it took when it was computed.",
    ]
    if report.seconds is not None:
        notes.append(f"This run: {format_seconds(report.seconds)} from its first to its last event.")
    header = ["Step", "State", "Time", *(["Cost"] if priced else []), "Tokens/s", "Peak memory", "Attempts"]
    return Table(header=header, align="ll" + "r" * (len(header) - 2), rows=rows, notes=notes)


def _attempts(step: StepReport) -> tuple[str, str]:
    attempts = [text(mapping(a).get("outcome")) for a in sequence(step.manifest.get("attempts"))]
    broken = Counter(outcome for outcome in attempts if outcome not in ("done", ""))
    detail = ", ".join(f"{count} {outcome}" for outcome, count in broken.items())
    return str(len(attempts)) if attempts else ABSENT, f"({detail})" if detail else ""


def machine_table(report: RunReport) -> Table | None:
    """Return hardware, software and code of all steps; where steps differ, each value names its steps."""
    facts: dict[str, dict[str, list[str]]] = {}

    def note(name: str, value: str, step: StepReport) -> None:
        if value:
            facts.setdefault(name, {}).setdefault(value, []).append(step.name)

    for step in report.steps:
        device = dict(mapping(step.manifest.get("device")))
        memory = number(device.pop("memory_bytes", None))
        for name, value in device.items():
            note({"name": "device"}.get(name, name), text(value), step)
        note("memory", format_bytes(memory) if memory else "", step)
        ranks = mapping(mapping(step.manifest.get("excluded")).get("ranks"))
        if ranks:
            hosts = ", ".join(dict.fromkeys(map(text, sequence(ranks.get("hosts")))))
            note("ranks", f"{text(ranks.get('size'))} ({text(ranks.get('backend'))}) on {hosts}", step)
        for name, value in mapping(step.manifest.get("versions")).items():
            note(name, text(value), step)
        git = mapping(step.manifest.get("git"))
        dirty = " with uncommitted changes" if git.get("dirty") else ""
        note("git commit", text(git.get("commit"))[:12] + dirty if git.get("commit") else "", step)
    rows = []
    for name, values in facts.items():
        # The value of most steps needs no names; those that differ do.
        usual = max(values, key=lambda value: len(values[value]))
        differing = [f"{value} ({', '.join(at)})" for value, at in values.items() if value != usual]
        shown = [usual, *differing]
        rows.append([Cell(name), Cell("; ".join(shown))])
    return Table(header=["What", "Value"], align="ll", rows=rows) if rows else None


def compression_tables(report: RunReport) -> list[tuple[StepReport, Table]]:
    """Return, for each tokenizer, the tokens it needs per text beside GPT-2's and GPT-4's."""
    found = []
    for step in report.steps:
        texts = [mapping(row) for row in sequence(step.compression.get("rows"))]
        if not texts:
            continue
        rivals = [
            (key, label)
            for key, label in (("gpt2", "GPT-2"), ("gpt4", "GPT-4"))
            if any(number(row.get(key)) for row in texts)
        ]
        rows = []
        for row in texts:
            size, ours = number(row.get("bytes")), number(row.get("ours"))
            ratio = f"{size / ours:.2f}" if size and ours else ABSENT
            cells = [Cell(text(row.get("text"))), Cell(_whole(size)), Cell(_whole(ours)), Cell(ratio)]
            for key, _ in rivals:
                theirs = number(row.get(key))
                gain = f"({(theirs - ours) / theirs:+.1%})" if theirs and ours is not None else ""
                cells.append(Cell(_whole(theirs), gain.replace("-", "−")))
            rows.append(cells)
        notes = []
        if vocabulary := number(step.compression.get("vocab_size")):
            notes.append(f"Vocabulary of {step.name}: {vocabulary:,.0f} tokens.")
        if rivals:
            notes.append("In brackets: how many tokens fewer ours needs than that tokenizer; negative is more.")
        header = ["Text", "Bytes", "Tokens", "Bytes/token", *(label for _, label in rivals)]
        found.append((step, Table(header=header, align="l" + "r" * (len(header) - 1), rows=rows, notes=notes)))
    return found


def _whole(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def artifact_table(report: RunReport) -> Table:
    """Return every artifact with its id, size and the artifacts it was made from."""
    rows = []
    total = 0.0
    for step in report.steps:
        outputs = [mapping(file) for file in sequence(step.manifest.get("outputs"))]
        size = sum(number(file.get("bytes")) or 0 for file in outputs)
        total += size
        made_from = [f"{role}: {source}" for role, source in _input_artifacts(report, step)]
        rows.append(
            [
                Cell(step.name),
                Cell(step.artifact or ABSENT),
                Cell(step.kind),
                Cell(format_bytes(size) if step.manifest else ABSENT),
                Cell(", ".join(made_from) or ABSENT),
            ]
        )
    rows.append([Cell("all steps"), Cell(""), Cell(""), Cell(format_bytes(total)), Cell("")])
    return Table(header=["Step", "Artifact", "Kind", "Size", "Made from"], align="lllrl", rows=rows)


def _input_artifacts(report: RunReport, step: StepReport) -> Iterable[tuple[str, str]]:
    recorded = mapping(step.manifest.get("inputs"))
    for role, name in step.inputs.items():
        planned = report.step(name)
        source = text(mapping(recorded.get(role)).get("artifact"))
        # A step's name says enough while its artifact of this run is what was used.
        yield role, source if source and planned and source != planned.artifact else name
    for role in recorded.keys() - step.inputs.keys():  # named by the configuration, made by no step of this run
        yield role, text(mapping(recorded[role]).get("artifact"))


def source_table(report: RunReport) -> Table | None:
    """Return the outside data that steps used, pinned and with its licence; the files of a repository together."""
    found: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for step in report.steps:
        for item in map(mapping, sequence(step.manifest.get("externals"))):
            address = text(item.get("url"))
            name = text(item.get("name")) or _named(address) or ABSENT
            pin = next(
                (text(item[key]) for key in ("version", "revision", "sha256") if item.get(key)), address or ABSENT
            )
            source = (name, pin, text(item.get("licence")) or ABSENT)
            found.setdefault(source, []).append((step.name, number(item.get("bytes")) or 0))
    rows = []
    for (name, pin, licence), uses in found.items():
        steps = list(dict.fromkeys(step for step, _ in uses))
        files = len(uses) // len(steps)
        size = sum(size for step, size in uses if step == steps[0])
        detail = f"({files:,} files)" if files > 1 else ""
        rows.append([Cell(name, detail), Cell(pin[:12] if len(pin) in (40, 64) else pin), Cell(licence),
                     Cell(format_bytes(size) if size else ABSENT), Cell(", ".join(steps))])  # fmt: skip
    header = ["Data", "Version", "Licence", "Size", "Used by"]
    return Table(header=header, align="lllrl", rows=rows) if rows else None


def _named(address: str) -> str:
    """Return owner and name of a repository's file (hf://datasets/owner/name/path), else the file's name."""
    scheme, _, path = address.partition("://")
    parts = path.split("/")
    return "/".join(parts[1:3]) if scheme == "hf" and len(parts) > 3 else parts[-1]


def overrides(report: RunReport) -> list[tuple[str, list[str]]]:
    """Return (names of steps, overrides they were computed under), alike steps together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for step in report.steps:
        if step.manifest:
            given = tuple(text(override) for override in sequence(step.manifest.get("overrides")))
            groups.setdefault(given, []).append(step.name)
    return [(join(names), list(given)) for given, names in groups.items()]
