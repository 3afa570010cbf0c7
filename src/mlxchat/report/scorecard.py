"""The table of metrics, nanochat's report card: Metric | BASE | MID | SFT | RL.

Its columns follow from the eval steps of the run and its rows from what they measured; chance and standard error
stand beside each accuracy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from mlxchat.config.wording import plural
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.published import NANOCHAT_VERDICTS, Reference, references
from mlxchat.report.scores import Scores, mean_centered_stderr
from mlxchat.report.tables import Cell, Table
from mlxchat.report.wording import (
    ABSENT,
    STAGE_LABELS,
    baseline_label,
    computing_seconds,
    format_fraction,
    format_seconds,
    join,
)
from mlxchat.runner.stage import best_of


@dataclass(frozen=True, kw_only=True)
class Column:
    """An eval step as a column of the metric table."""

    label: str
    step: StepReport
    scores: Scores | None
    pass_at_k: dict[int, tuple[float, float | None]]
    """With standard errors, where they are known."""


def columns(report: RunReport) -> list[Column]:
    """Return one column per eval step, in order of training, each with a label of its own."""
    evals = report.evals
    scored = [checkpoint_name(step) for step in evals]
    sources = [report.step(name) for name in scored]
    stages = [STAGE_LABELS.get(source.stage, "") if source else "" for source in sources]
    choices = [[*pair, step.name] for *pair, step in zip(stages, scored, evals, strict=True)]
    # The first kind of name that no other eval shares: the stage's, the checkpoint's, its own.
    counts = [Counter(kind) for kind in zip(*choices, strict=True)]
    return [
        Column(
            label=next((c for c, count in zip(choice, counts, strict=True) if c and count[c] == 1), step.name),
            step=step,
            scores=step.scores,
            pass_at_k=_pass_at_k(report, step),
        )
        for choice, step in zip(choices, evals, strict=True)
    ]


def passes(step: StepReport) -> list[int]:
    """Return the k for which a step logged pass@k, ascending: powers of two and the largest."""
    found = (re.fullmatch(r"pass_at_(\d{1,6})", name) for name in step.all_series)
    ks = sorted(int(match[1]) for match in found if match)
    return [k for k in ks if k.bit_count() == 1 or k == ks[-1]]


def _pass_at_k(report: RunReport, step: StepReport) -> dict[int, tuple[float, float | None]]:
    """Return pass@k of the checkpoint that an eval step scored.

    If the eval did not measure it, an rl step did: of its own checkpoint at its last iteration, and of the one
    it began with before its first.
    """
    if step.scores and step.scores.pass_at_k:
        return step.scores.pass_at_k
    checkpoint = checkpoint_name(step)
    for trained in report.steps:
        ks = passes(trained)
        if ks and trained.name == checkpoint and trained.manifest:
            return {k: _measured(trained, k, trained.series(f"pass_at_{k}")[0][-1]) for k in ks}
        if ks and trained.inputs.get("checkpoint") == checkpoint:
            return {k: _measured(trained, k, 0) for k in ks if trained.series(f"pass_at_{k}")[0][0] == 0}
    return {}


def _measured(step: StepReport, k: int, iteration: float) -> tuple[float, float | None]:
    """Return pass@k at an iteration, and its standard error over the problems."""
    value, error = (dict(zip(*step.series(f"pass_at_{k}{end}"), strict=True)) for end in ("", "_stderr"))
    return value[iteration], error.get(iteration)


def metric_table(report: RunReport) -> Table | None:
    """Return Metric | BASE | MID | SFT | RL as far as there are eval steps, None if there is none."""
    chosen = columns(report)
    if not chosen:
        return None
    scores = [column.scores or Scores(checkpoint="") for column in chosen]
    rows = []
    if any(s.bpb is not None for s in scores):
        rows.append(_row(Cell("val bpb"), [s.bpb for s in scores], _four_decimals, best=best_of("eval", "val_bpb")))
    if any(s.train_bpb is not None for s in scores):
        rows.append(
            _row(
                Cell("train bpb"), [s.train_bpb for s in scores], _four_decimals, best=best_of("pretrain", "train_bpb")
            )
        )
    if any(s.perplexity is not None for s in scores):
        rows.append(_row(Cell("perplexity", "per token"), [s.perplexity for s in scores], "{:.2f}".format, best=None))
    if any(s.core for s in scores):
        cores = [s.core for s in scores]
        best = best_of("eval", "core") if len({(c.max_per_task, c.cropped > 0) for c in cores if c}) == 1 else None
        values, errors = [c.value if c else None for c in cores], [c.stderr if c else None for c in cores]
        rows.append(_row(Cell("CORE"), values, _four_decimals, errors=errors, show_error=_four_decimals, best=best))
    for task in task_names(chosen):
        results = [s.tasks.get(task) for s in scores]
        chances = sorted({r.chance for r in results if r and r.chance is not None})
        chance = " or ".join(map(format_fraction, chances))
        rows.append(
            _row(
                Cell(task, f"chance {chance}" if chance else ""),
                [r.accuracy if r else None for r in results],
                format_fraction,
                errors=[r.stderr if r else None for r in results],
                chance=max(chances, default=None),
            )
        )
    if any(s.chatcore is not None for s in scores):
        same = len({tuple(s.chatcore_tasks) for s in scores if s.chatcore is not None}) == 1
        values, errors = [s.chatcore for s in scores], [s.chatcore_stderr for s in scores]
        row = _row(Cell("ChatCORE"), values, _four_decimals, errors=errors, show_error=_four_decimals,
                   best=best_of("eval", "chatcore") if same else None)  # fmt: skip
        rows.append(row)
    if any(s.mean_centered is not None and s.chatcore is None for s in scores):
        values, errors = [s.mean_centered for s in scores], [mean_centered_stderr(s) for s in scores]
        row = _row(Cell("mean centred"), values, "{:.3f}".format, errors=errors, show_error="{:.3f}".format,
                   best=best_of("eval", "mean_centered") if _same_tasks(scores) else None)  # fmt: skip
        rows.append(row)
    for k in sorted({k for column in chosen for k in column.pass_at_k}):
        found = [column.pass_at_k.get(k, (None, None)) for column in chosen]
        values, errors = [value for value, _ in found], [error for _, error in found]
        rows.append(_row(Cell(f"pass@{k}"), values, format_fraction, errors=errors))
    header = ["Metric", *(column.label for column in chosen)]
    align = "l" + "r" * len(chosen)
    return Table(header=header, align=align, rows=rows, notes=_metric_notes(chosen, scores))


def published_tables(report: RunReport) -> list[tuple[Reference, Table]]:
    """Return, for each published recipe that this run followed, its results beside those of the run."""
    return [(reference, _published_table(report, reference)) for reference in references(report)]


def _published_table(report: RunReport, reference: Reference) -> Table:
    own, chosen = metric_table(report), columns(report)
    ours = {row[0].text: row[1:] for row in own.rows} if own else {}
    stages = list(reference.columns)
    notes = [f"{reference.name}: {reference.where}; {reference.how}. Nothing of it was measured here."]
    counts = {len(c.scores.chatcore_tasks) for c in chosen if c.scores and c.scores.chatcore is not None}
    if counts - {reference.chatcore_tasks}:
        number = ", ".join(map(str, sorted(counts)))
        notes.append(f"ChatCORE there is over {reference.chatcore_tasks} tasks, here over {number}: not comparable.")
        ours.pop("ChatCORE", None)
    cut = [c for c in chosen if c.scores and c.scores.core and c.scores.core.cropped]
    if cut and "CORE" in ours:
        notes.append(
            f"CORE here is of another rule (prompts of {join(c.label for c in cut)} were cut to the context): not "
            "comparable. eval.core.long_prompts=extend computes them as nanochat does."
        )
        ours["CORE"] = [Cell(ABSENT) if c in cut else cell for c, cell in zip(chosen, ours["CORE"], strict=True)]
    for metric in NANOCHAT_VERDICTS:
        if metric in ours:
            ours[metric] = [_by_nanochat(metric, column) for column in chosen]
    if any(cell.text != ABSENT for metric in NANOCHAT_VERDICTS for cell in ours.get(metric, [])):
        notes.append(f"{join(NANOCHAT_VERDICTS)} here: by nanochat's verdicts, as there; the table above has our own.")
    rows = []
    for metric in dict.fromkeys(name for values in reference.columns.values() for name in values):
        cells = [Cell(metric)]
        for stage in stages:
            value = reference.columns[stage].get(metric)
            is_share = metric not in ("val bpb", "CORE", "ChatCORE")
            shown = ABSENT if value is None else format_fraction(value) if is_share else f"{value:g}"
            here = _ours(report, chosen, ours.get(metric, []), stage) if value is not None else ""
            cells.append(Cell(shown, f"(here {here})" if here else ""))
        rows.append(cells)
    rows.append([Cell("wall clock"), Cell(format_seconds(reference.seconds), f"(here {_time(report)})"),
                 *[Cell("")] * (len(stages) - 1)])  # fmt: skip
    header = ["Published elsewhere", *(STAGE_LABELS.get(stage, stage) for stage in stages)]
    return Table(header=header, align="l" + "r" * len(stages), rows=rows, notes=notes)


def _clear_best(
    measured: list[tuple[float, float]], best: Callable[[list[float]], float], chance: float | None
) -> float | None:
    """Return the best of values with standard errors; None unless it is beyond all others and beyond chance.

    Beyond: by more than two standard errors of the difference. With one value, or all alike, nothing is best.
    """
    if len({value for value, _ in measured}) < 2:
        return None
    top = best([value for value, _ in measured])
    error = max(error for value, error in measured if value == top)
    others = [(value, other) for value, other in measured if value != top]
    others += [] if chance is None else [(chance, 0.0)]
    if chance is not None and top <= chance:
        return None
    return top if all(abs(top - value) > 2 * math.hypot(error, other) for value, other in others) else None


def _by_nanochat(metric: str, column: Column) -> Cell:
    """Return a score by nanochat's verdicts; a dash where they were not recorded."""
    scores = column.scores or Scores(checkpoint="")
    if metric == "ChatCORE":
        value, error = scores.chatcore_nanochat or (None, None)
        return _row(Cell(metric), [value], _four_decimals, errors=[error], show_error=_four_decimals)[1]
    task = scores.tasks.get(metric)
    value, error = (task.nanochat if task else None) or (None, None)
    return _row(Cell(metric), [value], format_fraction, errors=[error])[1]


def _time(report: RunReport) -> str:
    return format_seconds(computing_seconds(report))


def _ours(report: RunReport, chosen: list[Column], cells: list[Cell], stage: str) -> str:
    """Return what this run has in a row of the table of metrics for the checkpoint of a stage."""
    for column, cell in zip(chosen, cells, strict=False):
        source = report.step(checkpoint_name(column.step))
        if source and source.stage == stage and cell.text != ABSENT:
            return f"{cell.text} {cell.detail}".strip()
    return ""


def core_table(report: RunReport) -> Table | None:
    """Return CORE task by task, for each eval that measured it; None if none did."""
    measured = [(c.label, c.scores.core) for c in columns(report) if c.scores and c.scores.core]
    names = list(dict.fromkeys(name for _, core in measured for name in core.tasks))
    if not names:
        return None
    rows = []
    for name in names:
        task = next(core.tasks[name] for _, core in measured if name in core.tasks)
        shots = f"{task.num_fewshot}" if task.num_fewshot is not None else ABSENT
        size = f"{task.num_examples:,}" if task.num_examples is not None else ABSENT
        cells = [Cell(name), Cell(task.kind.replace("_", " ")), Cell(shots), Cell(size),
                 Cell(format_fraction(task.baseline))]  # fmt: skip
        for _, core in measured:
            found = core.tasks.get(name)
            error = f"± {100 * found.stderr:.1f}" if found and found.stderr is not None else ""
            cells.append(Cell(format_fraction(found.accuracy if found else None), error))
            cells.append(Cell(f"{found.centered:.3f}" if found and found.centered is not None else ABSENT))
        rows.append(cells)
    total = [Cell("CORE"), *[Cell("")] * 4]
    for _, core in measured:
        error = f"± {core.stderr:.4f}" if core.stderr is not None else ""
        total += [Cell(""), Cell(ABSENT if core.value is None else f"{core.value:.4f}", error)]
    labels = [f"{label}{part}" for label, _ in measured for part in ("", " centred")]
    header = ["Task", "Type", "Shots", "Examples", "Baseline", *labels]
    return Table(header=header, align="llrrr" + "r" * len(labels), rows=[*rows, total])


def task_names(chosen: list[Column]) -> list[str]:
    """Return every task that some column measured, in order of first appearance."""
    return list(dict.fromkeys(task for c in chosen if c.scores for task in c.scores.tasks))


def _row(
    label: Cell,
    values: list[float | None],
    show: Callable[[float], str],
    *,
    best: Callable[[list[float]], float] | None = max,
    errors: list[float | None] | None = None,
    show_error: Callable[[float], str] = lambda error: f"{100 * error:.1f}",
    chance: float | None = None,
) -> list[Cell]:
    pairs = list(zip(values, errors or [None] * len(values), strict=True))
    measured = [(value, error or 0.0) for value, error in pairs if value is not None]
    top = _clear_best(measured, best, chance) if best else None
    cells = [label]
    for value, error in pairs:
        detail = f"± {show_error(error)}" if value is not None and error is not None else ""
        cells.append(Cell(ABSENT if value is None else show(value), detail, value is not None and value == top))
    return cells


def _long_prompts(column: Column) -> str:
    """Return what was done with prompts longer than the context, empty where none was."""
    core = column.scores.core if column.scores else None
    if core is None or not (core.extended or core.cropped):
        return ""
    context = f"the context of {core.context_tokens:,} tokens" if core.context_tokens else "the context"
    if core.cropped:
        cut = plural(core.cropped, "prompt")
        return f"{cut} longer than {context} lost their beginning; nanochat computes them whole."
    return f"{plural(core.extended, 'prompt')} longer than {context} computed beyond it, as nanochat does."


def _four_decimals(value: float) -> str:
    return f"{value:.4f}"


def _same_tasks(scores: list[Scores]) -> bool:
    return len({frozenset(s.tasks) for s in scores if s.mean_centered is not None}) <= 1


def _metric_notes(chosen: list[Column], scores: list[Scores]) -> list[str]:
    notes = []
    if any(s.bpb is not None for s in scores):
        notes.append("val bpb: bits per byte of held-out text, lower is better; it does not depend on the vocabulary.")
        for column in chosen:
            if column.scores and column.scores.baselines:
                others = [f"the {baseline_label(n)} {v:.4f}" for n, v in column.scores.baselines.items()]
                notes.append(f"Baselines on the same text as {column.label}: {join(others)}.")
    tasks = {name: task for s in scores for name, task in s.tasks.items()}
    if tasks:
        kinds = {
            "categorical": "the answer letter that the model finds likeliest is right",
            "generative": "the answer that the model writes is right",
        }
        for kind, meaning in kinds.items():
            if of_kind := [name for name, task in tasks.items() if task.kind == kind]:
                sized = [
                    f"{name} ({plural(n, 'example')})" if (n := tasks[name].num_examples) else name for name in of_kind
                ]
                notes.append(f"{join(sized)}: share of examples in which {meaning}.")
        notes.append("chance: what guessing scores. ±: one standard error, in percentage points.")
    if cores := [s.core for s in scores if s.core]:
        limits = {c.max_per_task for c in cores}
        sizes = join(f"at most {limit:,} of each" if limit else "all" for limit in limits)
        notes.append(f"CORE: mean centred accuracy over the DCLM bundle's 22 tasks (examples: {sizes}); 0 is guessing.")
        notes += [
            f"CORE of {column.label}: {rule}" for column in chosen if column.scores and (rule := _long_prompts(column))
        ]
    if chat := next((s for s in scores if s.chatcore is not None), None):
        notes.append(f"ChatCORE: mean centred accuracy over {join(chat.chatcore_tasks) or 'its tasks'}.")
    if any(s.mean_centered is not None and s.chatcore is None for s in scores):
        formula = "(accuracy − chance) / (1 − chance)"
        notes.append(
            f"mean centred: mean over the tasks of {formula}, the formula of nanochat's ChatCORE; "
            "0 is guessing, 1 is perfect."
        )
        if not _same_tasks(scores):
            notes.append("The columns were scored on different tasks: their mean centred are not comparable.")
    if any(column.pass_at_k for column in chosen):
        notes.append("pass@k: share of held-out problems for which at least one of k sampled answers is right.")
    notes.append(
        "Bold: best of the row and above chance, where ± is given by more than two standard errors of the difference. "
        f"{ABSENT}: not measured."
    )
    return notes
