"""The tables of the report, free of any output format: scores, published results, times, machines, artifacts, settings.

Which rows and columns there are
follows from the steps of the run and from what they measured.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlxchat.config.parts import is_own
from mlxchat.config.table import Cell, Table
from mlxchat.config.wording import (
    ABSENT,
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
from mlxchat.tasks import task_class, task_names

Pairs = list[tuple[str, str]]

_DIGITS = {"val_bpb": 4, "perplexity": 2, "text_bpb": 4, "core": 4, "chatcore": 4, "mean_centered": 3}


def pairs_table(title: str, pairs: Pairs, value: str = "Value") -> Table:
    """Return a table of names and values."""
    return Table(header=[title, value], align="lr", rows=[[Cell(name), Cell(shown)] for name, shown in pairs])


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
    best = _direction(measured[0])
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


def _direction(measure: Measure) -> Callable[..., float] | None:
    """Return min or max as the stage declares the metric; None: neither is better."""
    if measure.is_share:
        return None if measure.metric == "form" else max
    return best_of("eval", measure.metric)


def _metric_notes(chosen: list[Column]) -> Iterator[str]:
    metrics = {measure.metric for column in chosen for measure in column.measures.values()}
    if "val_bpb" in metrics:
        yield "val bpb: bits per byte of held-out text, lower is better; it does not depend on the vocabulary."
        for column in chosen:
            if column.scores.baselines:
                others = [f"the {baseline_label(n)} {v:.4f}" for n, v in column.scores.baselines.items()]
                yield f"Baselines on the same text as {column.label}: {join(others)}."
    tasks = {name: task for column in chosen for name, task in column.scores.tasks.items()}
    for kind, meaning in (
        ("categorical", "the answer letter that the model finds likeliest is right"),
        ("generative", "the answer that the model writes is right"),
    ):
        if of_kind := [task for task in tasks.values() if task.kind == kind]:
            sized = [
                f"{t.name} ({plural(t.num_questions, 'question')})" if t.num_questions else t.name for t in of_kind
            ]
            yield f"{join(sized)}: share of questions in which {meaning}."
    if _wrong_forms(chosen):
        yield "right number: also without ####. right form: any number after ####. An answer is right with both."
    if tasks:
        yield "chance: what guessing scores. ±: one standard error, in percentage points."
    if "core" in metrics or any(column.scores.core_tasks for column in chosen):
        cores = [column.scores for column in chosen if column.scores.core_tasks]
        limits = dict.fromkeys(scores.core_conditions.get("max_per_task") for scores in cores)
        sizes = join(f"at most {limit:,} of each" if limit else "all" for limit in limits)
        yield f"CORE: mean centred accuracy over the DCLM bundle's 22 tasks (examples: {sizes}); 0 is guessing."
        yield from (f"CORE of {column.label}: {rule}" for column in chosen if (rule := _long_prompts(column.scores)))
    if chat := next((column.scores for column in chosen if column.scores.find("chatcore")), None):
        yield f"ChatCORE: mean centred accuracy over {join(chat.chatcore_tasks) or 'its tasks'}."
    if "mean_centered" in metrics:
        yield (
            "mean centred: mean over the tasks of (accuracy − chance) / (1 − chance), the formula of nanochat's "
            "ChatCORE; 0 is guessing, 1 is perfect."
        )
        if len({m.conditions for column in chosen if (m := column.scores.find("mean_centered"))}) > 1:
            yield "The columns were scored on different tasks: their mean centred are not comparable."
    if "pass_at_k" in metrics:
        yield "pass@k: share of held-out problems for which at least one of k sampled answers is right."
    yield (
        "Bold: best of the row and above chance, where ± is given by more than two standard errors of the difference. "
        f"{ABSENT}: not measured."
    )


def _long_prompts(scores: Scores) -> str:
    """Return a note about prompts longer than the context, empty if there were none."""
    found = scores.core_conditions
    context = f"the context of {found['context_tokens']:,} tokens" if "context_tokens" in found else "the context"
    if cropped := found.get("cropped"):
        return f"{plural(cropped, 'prompt')} longer than {context} lost their beginning; nanochat computes them whole."
    if extended := found.get("extended"):
        return f"{plural(extended, 'prompt')} longer than {context} computed beyond it, as nanochat does."
    return ""


def core_table(report: RunReport) -> Table | None:
    """Return CORE per task for each eval that measured it, None if none did."""
    measured = [column for column in columns(report) if column.scores.core_tasks]
    tasks = {name: task for column in reversed(measured) for name, task in column.scores.core_tasks.items()}
    if not tasks:
        return None
    rows = []
    for name, task in tasks.items():
        cells = [Cell(name), Cell(task.kind.replace("_", " ")), Cell(known("{:.0f}".format, task.shots)),
                 Cell(known("{:,}".format, task.num_questions)), Cell(known(format_share, task.chance))]  # fmt: skip
        for column in measured:
            found = column.scores.core_tasks.get(name)
            cells += [shown(found), Cell(known("{:.3f}".format, found.centered if found else None))]
        rows.append(cells)
    total = [Cell("CORE"), *[Cell("")] * 4]
    for column in measured:
        total += [Cell(""), shown(column.scores.find("core"))]
    labels = [f"{column.label}{part}" for column in measured for part in ("", " centred")]
    header = ["Task", "Type", "Shots", "Examples", "Baseline", *labels]
    return Table(header=header, align="llrrr" + "r" * len(labels), rows=[*rows, total])


@cache
def _published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("mlxchat.report").joinpath("published.json").read_text(encoding="utf-8"))
    return found


def published_core() -> dict[str, float]:
    """Return model → CORE as published in the DCLM bundle and by nanochat."""
    return dict(_published()["core"])


def references(report: RunReport) -> list[dict[str, Any]]:
    """Return the rows of published.json for the recipe that a run followed, if any.

    A row belongs beside a run only if architecture, depth, horizon and corpus are those it was measured with.
    """
    recipes = [_recipe(report, step) for step in report.steps if step.stage == "pretrain"]
    return [row for row in _published()["rows"] if any(_is_same(recipe, row["match"]) for recipe in recipes)]


def _recipe(report: RunReport, step: StepReport) -> dict[str, Any]:
    """Return architecture, depth, tokens per parameter and corpus of a pretraining, as far as known."""
    config, derived = (mapping(step.manifest.get(key)) for key in ("full_config", "derived"))
    corpus = report.step(step.inputs.get("corpus", ""))
    hub = mapping(mapping(mapping(corpus.manifest.get("full_config")).get("corpus")).get("hub")) if corpus else {}
    horizon = mapping(config.get("pretrain"))
    is_cut = horizon.get("num_iterations") is not None or horizon.get("target_flops") is not None
    return {
        "architecture": text(mapping(config.get("architecture")).get("name")),
        "depth": number(derived.get("num_layers")),
        "tokens_per_parameter": None if is_cut else number(horizon.get("tokens_per_parameter")),
        "repository": text(hub.get("repository")),
    }


def _is_same(recipe: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    ratio = recipe["tokens_per_parameter"]
    is_as_long = bool(ratio) and abs(ratio / wanted["tokens_per_parameter"] - 1) <= 0.05
    return is_as_long and all(recipe[key] == value for key, value in wanted.items() if key != "tokens_per_parameter")


def published_tables(report: RunReport) -> list[tuple[str, Table]]:
    """Return the name of each published recipe that this run followed, and its results beside those of the run."""
    return [(reference["name"], _published_table(report, reference)) for reference in references(report)]


def _published_table(report: RunReport, reference: Mapping[str, Any]) -> Table:
    by_stage = {}
    for column in columns(report):
        source = report.step(checkpoint_name(column.step))
        by_stage[source.stage if source else ""] = column
    stages = list(reference["columns"])
    rows, used = [], []
    for name in dict.fromkeys(name for values in reference["columns"].values() for name in values):
        cells = [Cell(name)]
        for stage in stages:
            value = reference["columns"][stage].get(name)
            ours = by_stage[stage].measures.get(name) if value is not None and stage in by_stage else None
            here = _comparable(ours, by_stage[stage].scores, reference) if ours else None
            used += [name] if here and here is not ours else []
            is_share = name not in ("val bpb", "CORE", "ChatCORE")
            there = ABSENT if value is None else format_share(value) if is_share else f"{value:g}"
            cell = shown(here)
            cells.append(Cell(there, f"(here {cell.text} {cell.detail}".rstrip() + ")" if here else ""))
        rows.append(cells)
    seconds = known(format_seconds, computing_seconds(report))
    rows.append([Cell("wall clock"), Cell(format_seconds(reference["seconds"]), f"(here {seconds})"),
                 *[Cell("")] * (len(stages) - 1)])  # fmt: skip
    notes = [f"{reference['name']}: {reference['where']}; {reference['how']}. Nothing of it was measured here."]
    if others := {n for c in by_stage.values() if (n := len(c.scores.chatcore_tasks))} - {reference["chatcore_tasks"]}:
        counts = join(map(str, sorted(others)))
        notes.append(f"ChatCORE there is over {reference['chatcore_tasks']} tasks, here over {counts}: not comparable.")
    if cut := [column.label for column in by_stage.values() if "cropped" in column.scores.core_conditions]:
        notes.append(
            f"CORE here is of another rule (prompts of {join(cut)} were cut to the context): not comparable. "
            "eval.core.long_prompts=extend computes them as nanochat does."
        )
    if used:
        rule = f"{join(dict.fromkeys(used))} here: by nanochat's verdicts, as there; the table above has our own."
        notes.append(rule)
    header = ["Published elsewhere", *(STAGE_LABELS.get(stage, stage) for stage in stages)]
    return Table(header=header, align="l" + "r" * len(stages), rows=rows, notes=notes)


def _comparable(ours: Measure, scores: Scores, reference: Mapping[str, Any]) -> Measure | None:
    """Return a measure under the rule of a published result, None if it was not measured so."""
    if ours.metric == "core" and "cropped" in scores.core_conditions:
        return None
    if ours.metric == "chatcore" and len(scores.chatcore_tasks) != reference["chatcore_tasks"]:
        return None
    return ours.by_published_rule() if ours.name in _published()["nanochat_verdicts"] else ours


def timing_table(report: RunReport) -> Table:
    """Return state, time, speed, memory and attempts of each step."""
    priced = report.cost_per_hour is not None
    rows = []
    for step in report.steps:
        cost = [format_dollars(step.seconds, report.cost_per_hour) or ABSENT] if priced else []
        speed = known(format_count, number(step.manifest.get("tokens_per_second")))
        memory = known(format_bytes, number(step.manifest.get("peak_memory_bytes")))
        words = [step.name, step.outcome, known(format_seconds, step.seconds), *cost, speed, memory]
        rows.append([*map(Cell, words), Cell(*_attempts(step))])
    total = [Cell("all steps"), Cell(""), Cell(known(format_seconds, computing_seconds(report)))]
    total += [Cell(format_dollars(computing_seconds(report), report.cost_per_hour))] if priced else []
    rows.append(total + [Cell("")] * 3)
    notes = ["Wall clock, over all attempts of a step. A cached step shows what it took when it was computed."]
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
        # Only values that differ from the most common one name their steps.
        usual = max(values, key=lambda value: len(values[value]))
        differing = [f"{value} ({', '.join(at)})" for value, at in values.items() if value != usual]
        rows.append([Cell(name), Cell("; ".join([usual, *differing]))])
    return Table(header=["What", "Value"], align="ll", rows=rows) if rows else None


def compression_tables(report: RunReport) -> list[tuple[StepReport, Table]]:
    """Return each tokenizer's tokens per text, compared with GPT-2 and GPT-4."""
    rivals = {"gpt2": "GPT-2", "gpt4": "GPT-4"}
    found = []
    for step in report.steps:
        rows = []
        for row in map(mapping, sequence(step.compression.get("rows"))):
            size, ours = number(row.get("bytes")), number(row.get("ours"))
            ratio = f"{size / ours:.2f}" if size and ours else ABSENT
            counts = [known("{:,.0f}".format, number(row.get(key))) for key in ("bytes", "ours")]
            others = [known("{:,.0f}".format, number(row.get(key))) for key in rivals]
            rows.append([Cell(words) for words in (text(row.get("text")), *counts, ratio, *others)])
        header = ["Text", "Bytes", "Tokens", "Bytes/token", *rivals.values()]
        if rows:
            found.append((step, Table(header=header, align="l" + "r" * (len(header) - 1), rows=rows)))
    return found


def artifact_table(report: RunReport) -> Table:
    """Return every artifact with id, size and inputs."""
    names = []
    total = 0.0
    for step in report.steps:
        outputs = [mapping(file) for file in sequence(step.manifest.get("outputs"))]
        size = sum(number(file.get("bytes")) or 0 for file in outputs)
        total += size
        made_from = [f"{role}: {source}" for role, source in _input_artifacts(report, step)]
        shown_size = format_bytes(size) if step.manifest else ABSENT
        names.append([step.name, step.artifact or ABSENT, step.kind, shown_size, ", ".join(made_from) or ABSENT])
    rows = [[*map(Cell, row)] for row in (*names, ["all steps", "", "", format_bytes(total), ""])]
    return Table(header=["Step", "Artifact", "Kind", "Size", "Made from"], align="lllrl", rows=rows)


def _input_artifacts(report: RunReport, step: StepReport) -> Iterable[tuple[str, str]]:
    recorded = mapping(step.manifest.get("inputs"))
    for role, name in step.inputs.items():
        planned = report.step(name)
        source = text(mapping(recorded.get(role)).get("artifact"))
        # The step's name suffices if its artifact of this run was used.
        yield role, source if source and planned and source != planned.artifact else name
    for role in recorded.keys() - step.inputs.keys():  # named by the configuration, made by no step of this run
        yield role, text(mapping(recorded[role]).get("artifact"))


def source_table(report: RunReport) -> Table | None:
    """Return the data of all steps with version and licence: one row per repository, package, own file and task."""
    found: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for step in report.steps:
        for item in map(mapping, sequence(step.manifest.get("externals"))):
            address = text(item.get("url"))
            name = text(item.get("name")) or _named(address) or ABSENT
            pins = [text(item[key]) for key in ("version", "revision", "sha256") if item.get(key)]
            source = (name, [*pins, address or ABSENT][0], text(item.get("licence")) or ABSENT)
            found.setdefault(source, []).append((step.name, number(item.get("bytes")) or 0))
        for source in _task_sources(step):
            found.setdefault(source, []).append((step.name, 0))
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


def _task_sources(step: StepReport) -> Iterator[tuple[str, str, str]]:
    """Yield name, version and licence of the files and tasks of mixtures and suites that are no external data."""
    pins = {key.split(" ")[1]: text(pin) for key, pin in mapping(step.manifest.get("pins")).items() if " " in key}
    package = f"mlxchat {text(mapping(step.manifest.get('versions')).get('mlxchat'))}".rstrip()

    def visit(values: Mapping[str, Any], place: str) -> Iterator[tuple[str, str, str]]:
        for key, value in values.items():
            inside = mapping(value)
            task, path = (text(inside.get(name)) for name in ("task", "path"))
            if path and task:
                yield Path(path).name, pins.get(f"{place}{key}.path", ABSENT), ABSENT
            elif is_own(task):
                yield task, ABSENT, ABSENT
            elif task in task_names() and not (task_class(task).source_options and step.manifest.get("externals")):
                yield task, package, "MIT"
            yield from visit(inside, f"{place}{key}.")

    # Sections that are not part of the id were not read: the suite of a base model, for example.
    config, read = (mapping(step.manifest.get(key)) for key in ("full_config", "config"))
    yield from dict.fromkeys(visit({name: section for name, section in config.items() if name in read}, ""))


def _named(address: str) -> str:
    """Return owner and name of a repository's file (hf://datasets/owner/name/path), else the file's name."""
    scheme, _, path = address.partition("://")
    parts = path.split("/")
    return "/".join(parts[1:3]) if scheme == "hf" and len(parts) > 3 else parts[-1]


def overrides(report: RunReport) -> list[tuple[str, list[str]]]:
    """Return (names of steps, their overrides), grouped by equal overrides."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for step in report.steps:
        if step.manifest:
            given = tuple(text(override) for override in sequence(step.manifest.get("overrides")))
            groups.setdefault(given, []).append(step.name)
    return [(join(names), list(given)) for given, names in groups.items()]


def step_tables(step: StepReport) -> list[Table]:
    """Return the non-empty tables of results and derived numbers of a step."""
    groups = {"Results": mapping(step.manifest.get("metrics")), "Derived": mapping(step.manifest.get("derived"))}
    return [
        pairs_table(title, [(key, format_value(value)) for key, value in values.items()])
        for title, values in groups.items()
        if values
    ]


def all_settings(step: StepReport) -> list[str]:
    """Return all settings of a step as key=value."""
    return [
        visible(f"{key}={_plain(value)}").replace("\n", "\\n")
        for key, value in flatten(mapping(step.manifest.get("full_config"))).items()
    ]


def _plain(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return "null" if value is None else text(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
