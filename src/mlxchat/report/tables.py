"""The tables of the report: scores, times, machines, artifacts, settings.

The rows and columns follow from the steps of the run and from what they measured.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlxchat.config.wording import (
    ABSENT,
    Cell,
    Table,
    format_bytes,
    format_count,
    format_dollars,
    format_exact,
    format_number,
    format_seconds,
    format_share,
    join,
    plural,
)
from mlxchat.errors import visible
from mlxchat.evals.scores import METRICS, Measure, Scores, mapping, number
from mlxchat.report.collect import STAGE_LABELS, RunReport, StepReport, checkpoint_name, sequence, text
from mlxchat.runner.stage import best_of
from mlxchat.store.fingerprint import flatten

_DIGITS = {"val_bpb": 4, "perplexity": 2, "text_bpb": 4, "core": 4, "chatcore": 4, "mean_centered": 3}


def known(show: Callable[[float], str], value: float | None) -> str:
    """Return a number as `show` formats it, or a dash."""
    return ABSENT if value is None else show(value)


def format_value(value: object) -> str:
    """Return a setting, version or number as text."""
    known_number = None if isinstance(value, bool) else number(value)
    return text(value) or ABSENT if known_number is None else format_exact(known_number)


def baseline_label(name: str) -> str:
    """Return the label of a baseline: ngram_order2 is "order-2 n-gram"."""
    if match := re.fullmatch(r"ngram_order(\d+)", name):
        return f"order-{match[1]} n-gram"
    return {"untrained": "untrained model"}.get(name, name.replace("_", " "))


def computing_seconds(report: RunReport) -> float | None:
    """Return the total wall-clock time of all steps; cached steps count with their original time."""
    found = [step.seconds for step in report.steps if step.seconds is not None]
    return sum(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Column:
    """An eval step as a column of the table of scores."""

    label: str
    step: StepReport
    scores: Scores
    measures: dict[str, Measure]
    """Its measures, and pass@k of RL for its checkpoint."""


def columns(report: RunReport) -> list[Column]:
    """Return a column per eval step in order of training, with unique labels."""
    evals = report.evals
    scored = [checkpoint_name(step) for step in evals]
    sources = [report.step(name) for name in scored]
    stages = [STAGE_LABELS.get(source.stage, "") if source else "" for source in sources]
    choices = [[*pair, step.name] for *pair, step in zip(stages, scored, evals, strict=True)]
    # The first unique one of: stage, checkpoint, step name.
    counts = [Counter(kind) for kind in zip(*choices, strict=True)]
    found = []
    for choice, step in zip(choices, evals, strict=True):
        label = next((c for c, count in zip(choice, counts, strict=True) if c and count[c] == 1), step.name)
        scores = step.scores or Scores()
        passed = {} if scores.find("pass_at_k") else _pass_at_k(report, checkpoint_name(step))
        found.append(Column(label=label, step=step, scores=scores, measures={**scores.measures, **passed}))
    return found


def passes(step: StepReport) -> list[int]:
    """Return the k for which a step logged pass@k, ascending: powers of two and the largest."""
    found = (re.fullmatch(r"pass_at_(\d{1,6})", name) for name in step.all_series)
    ks = sorted(int(match[1]) for match in found if match)
    return [k for k in ks if k.bit_count() == 1 or k == ks[-1]]


def _pass_at_k(report: RunReport, checkpoint: str) -> dict[str, Measure]:
    """Return pass@k measured by RL: at its end for its own checkpoint, at its start for its initial checkpoint."""
    for step in report.steps:
        for position, is_of_it in (
            (-1, step.name == checkpoint and bool(step.manifest)),
            (0, step.inputs.get("checkpoint") == checkpoint),
        ):
            found = {}
            for k in passes(step) if is_of_it else ():
                xs, ys = step.series(f"pass_at_{k}")
                errors = dict(zip(*step.series(f"pass_at_{k}_stderr"), strict=True))
                if position == -1 or xs[0] == 0:
                    found[f"pass@{k}"] = Measure(name=f"pass@{k}", metric="pass_at_k", value=ys[position],
                                                 stderr=errors.get(xs[position]))  # fmt: skip
            if found:
                return found
    return {}


def metric_table(report: RunReport) -> Table | None:
    """Return the table of scores with a column per eval step, None without eval steps."""
    chosen = columns(report)
    if not chosen:
        return None
    measures = [measure for column in chosen for measure in column.measures.values()]
    names = list(dict.fromkeys(each.name for each in sorted(measures, key=lambda each: METRICS.index(each.metric))))
    costly = _wrong_forms(chosen)
    names = [name for name in names if ": right " not in name or name.partition(": right ")[0] in costly]
    rows = [_row(name, [column.measures.get(name) for column in chosen]) for name in names]
    header = ["Metric", *(column.label for column in chosen)]
    return Table(header=header, align="l" + "r" * len(chosen), rows=rows, notes=list(_metric_notes(chosen)))


def _wrong_forms(chosen: list[Column]) -> set[str]:
    """Return the tasks in which a right number was not right because of its form."""
    found = ((name, task, column) for column in chosen for name, task in column.scores.tasks.items())
    return {name for name, task, column in found if (right := column.measures.get(f"{name}: right number"))
            and right.value > task.value}  # fmt: skip


def _row(name: str, found: list[Measure | None]) -> list[Cell]:
    measured = [measure for measure in found if measure is not None]
    chances = sorted({measure.chance for measure in measured if measure.chance is not None})
    detail = f"chance {' or '.join(map(format_share, chances))}" if chances else ""
    detail = "per token" if measured[0].metric == "perplexity" else detail
    best = _clear_best(measured, chances)
    return [Cell(name, detail), *(shown(m, is_best=m is not None and m.value == best) for m in found)]


def shown(measure: Measure | None, *, is_best: bool = False) -> Cell:
    """Return a measure with its standard error, a dash if it is absent."""
    if measure is None:
        return Cell(ABSENT)
    digits = _DIGITS.get(measure.metric)
    if measure.is_share:
        words, error = format_share(measure.value), f"± {100 * (measure.stderr or 0):.1f}"
    elif digits is None:
        words, error = format_number(measure.value), f"± {format_number(measure.stderr)}"
    else:
        words, error = f"{measure.value:.{digits}f}", f"± {measure.stderr or 0:.{digits}f}"
    details = [] if measure.stderr is None else [error]
    if measure.any_right is not None:
        details.append(f"any of {measure.any_right[1]}: {format_share(measure.any_right[0])}")
    return Cell(words, ", ".join(details), is_best)


def _clear_best(measured: list[Measure], chances: list[float]) -> float | None:
    """Return the best of comparable values; None unless it is beyond all others and beyond chance.

    Beyond: by more than two standard errors of the difference. With one value, or all alike, nothing is best.
    """
    first = measured[0]
    if first.metric == "form":  # neither more nor less is better
        return None
    best = max if first.is_share else best_of("eval", first.metric)
    if best is None or len({each.conditions for each in measured}) > 1 or len({each.value for each in measured}) < 2:
        return None
    top: float = best(each.value for each in measured)
    error = max(each.stderr or 0.0 for each in measured if each.value == top)
    others = [(each.value, each.stderr or 0.0) for each in measured if each.value != top]
    if chances:
        if top <= chances[-1]:
            return None
        others.append((chances[-1], 0.0))
    return top if all(abs(top - value) > 2 * math.hypot(error, other) for value, other in others) else None


def _metric_notes(chosen: list[Column]) -> Iterator[str]:
    metrics = {measure.metric for column in chosen for measure in column.measures.values()}
    if "val_bpb" in metrics:
        yield "val bpb: bits per byte of held-out text, lower is better; it does not depend on the vocabulary."
        for column in chosen:
            if column.scores.baselines:
                others = [f"the {baseline_label(n)} {v:.4f}" for n, v in column.scores.baselines.items()]
                yield f"Baselines on the same text as {column.label}: {join(others)}."
    tasks = {name: task for column in chosen for name, task in column.scores.tasks.items()}
    if tasks:
        sized = [f"{t.name} ({plural(t.num_questions, 'question')})" for t in tasks.values() if t.num_questions]
        yield f"{join(sized)}: share of right answers. chance: what guessing scores. ±: one standard error, in points."
    if _wrong_forms(chosen):
        yield "right number: also without ####. right form: any number after ####. An answer is right with both."
    for column in chosen:
        if column.scores.core_tasks and (cropped := column.scores.core_conditions.get("cropped")):
            words = f"{plural(cropped, 'long prompt')} lost the beginning, unlike in nanochat: not comparable"
            yield f"CORE of {column.label}: {words}."
        elif column.scores.core_tasks and (most := column.scores.core_conditions.get("max_per_task")):
            yield f"CORE of {column.label}: at most {most:,} examples of each of the 22 tasks."
    means = {"core": "CORE", "chatcore": "ChatCORE", "mean_centered": "mean centred"}
    if found := [name for metric, name in means.items() if metric in metrics]:
        yield (
            f"{', '.join(found)}: mean over the tasks of (accuracy − chance) / (1 − chance), nanochat's "
            "formula; 0 is guessing, 1 is perfect."
        )
        if len({m.conditions for column in chosen if (m := column.scores.find("mean_centered"))}) > 1:
            yield "The columns were scored on different tasks: their mean centred are not comparable."
    if "pass_at_k" in metrics:
        yield "pass@k: share of held-out problems for which at least one of k sampled answers is right."
    yield "Bold: best of the row and above chance, by more than two standard errors of the difference where ± is given."


def core_table(report: RunReport) -> Table | None:
    """Return CORE per task for each eval that measured it, None if none did."""
    measured = [column for column in columns(report) if column.scores.core_tasks]
    tasks = {name: task for column in reversed(measured) for name, task in column.scores.core_tasks.items()}
    if not tasks:
        return None
    rows: list[list[Cell | str]] = []
    for name, task in tasks.items():
        about = [name, task.kind.replace("_", " "), known("{:.0f}".format, task.shots)]
        about += [known("{:,}".format, task.num_questions), known(format_share, task.chance)]
        rows.append([*about, *(shown(column.scores.core_tasks.get(name)) for column in measured)])
    rows.append(["CORE", "", "", "", "", *(shown(column.scores.find("core")) for column in measured)])
    header = ["Task", "Type", "Shots", "Examples", "Baseline", *(column.label for column in measured)]
    return Table(header=header, align="llrrr" + "r" * len(measured), rows=rows)


def all_settings(step: StepReport) -> list[str]:
    """Return all settings of a step as key=value."""
    return [
        visible(f"{key}={'null' if value is None else text(value)}").replace("\n", "\\n")
        for key, value in flatten(mapping(step.manifest.get("full_config"))).items()
    ]


def timing_table(report: RunReport) -> Table:
    """Return state, time, cost if it is known, speed and memory of each step."""
    priced = report.cost_per_hour is not None
    rows = []
    for step in report.steps:
        cost = [format_dollars(step.seconds, report.cost_per_hour) or ABSENT] if priced else []
        speed = known(format_count, number(step.manifest.get("tokens_per_second")))
        memory = known(format_bytes, number(step.manifest.get("peak_memory_bytes")))
        rows.append([step.name, step.outcome, known(format_seconds, step.seconds), *cost, speed, memory])
    total = computing_seconds(report)
    cost = [format_dollars(total, report.cost_per_hour)] if priced else []
    rows.append(["all steps", "", known(format_seconds, total), *cost, "", ""])
    notes = ["Wall clock, over all attempts of a step. A cached step shows what it took when it was computed."]
    if report.seconds is not None:
        notes.append(f"This run: {format_seconds(report.seconds)} from its first to its last event.")
    header = ["Step", "State", "Time", *(["Cost"] if priced else []), "Tokens/s", "Peak memory"]
    return Table(header=header, align="ll" + "r" * (len(header) - 2), rows=rows, notes=notes)


def machine_table(report: RunReport) -> Table | None:
    """Return hardware, software and code of all steps; a fact that differs between steps has several values."""
    facts: dict[str, list[str]] = {}
    for step in report.steps:
        device, git = mapping(step.manifest.get("device")), mapping(step.manifest.get("git"))
        values = {"device": device.get("name"), **device, "name": None, **mapping(step.manifest.get("versions"))}
        values["memory_bytes"] = known(format_bytes, number(device.get("memory_bytes")))
        if ranks := mapping(mapping(step.manifest.get("excluded")).get("ranks")):
            values["ranks"] = f"{text(ranks.get('size'))} on {', '.join(map(text, sequence(ranks.get('hosts'))))}"
        if git.get("commit"):
            dirty = " with uncommitted changes" if git.get("dirty") else ""
            values["git commit"] = text(git["commit"])[:12] + dirty
        for name, value in values.items():
            if value is not None:
                facts.setdefault(name.removesuffix("_bytes"), []).append(text(value))
    rows = [[name, "; ".join(dict.fromkeys(values))] for name, values in facts.items()]
    return Table(header=["What", "Value"], align="ll", rows=rows) if rows else None


def compression_table(step: StepReport) -> Table | None:
    """Return a tokenizer's tokens per text, compared with GPT-2 and GPT-4; None for other steps."""
    rows = []
    for row in map(mapping, sequence(step.compression.get("rows"))):
        size, ours, *rivals = (number(row.get(key)) for key in ("bytes", "ours", "gpt2", "gpt4"))
        ratio = f"{size / ours:.2f}" if size and ours else ABSENT
        size_shown, ours_shown, *theirs = (known("{:,.0f}".format, count) for count in (size, ours, *rivals))
        rows.append([text(row.get("text")), size_shown, ours_shown, ratio, *theirs])
    header = ["Text", "Bytes", "Tokens", "Bytes/token", "GPT-2", "GPT-4"]
    return Table(header=header, align="lrrrrr", rows=rows) if rows else None


def artifact_table(report: RunReport) -> Table:
    """Return every artifact with its kind, size and inputs."""
    rows = []
    for step in report.steps:
        size = sum(number(mapping(file).get("bytes")) or 0 for file in sequence(step.manifest.get("outputs")))
        made_from = ", ".join(f"{role}: {source}" for role, source in step.inputs.items())
        shown_size = format_bytes(size) if step.manifest else ABSENT
        rows.append([step.name, step.artifact or ABSENT, step.kind, shown_size, made_from or ABSENT])
    return Table(header=["Step", "Artifact", "Kind", "Size", "Made from"], align="lllrl", rows=rows)


def source_table(report: RunReport) -> Table | None:
    """Return the external data of all steps with version and licence: one row per repository, package and file."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for step in report.steps:
        for item in map(mapping, sequence(step.manifest.get("externals"))):
            scheme, _, path = text(item.get("url")).partition("://")
            parts = path.split("/")  # of hf://datasets/OWNER/NAME/PATH
            name = "/".join(parts[1:3]) if scheme == "hf" else text(item.get("name")) or parts[-1]
            pins = [text(item[key])[:12] for key in ("version", "revision", "sha256") if item.get(key)]
            source = (name or ABSENT, next(iter(pins), ABSENT), text(item.get("licence")) or ABSENT)
            found.setdefault(source, []).append(step.name)
    rows = [[*source, ", ".join(dict.fromkeys(steps))] for source, steps in found.items()]
    return Table(header=["Data", "Version", "Licence", "Used by"], align="llll", rows=rows) if rows else None
