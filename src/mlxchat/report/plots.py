"""Which pictures a run gives: curves of each training, accuracy against chance, CORE task by task, and beside GPT-2.

They follow from what each step logged and measured, not from its name. The bars of a task are in the order of training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.drawing import COLOURS, Bar, Bars, Chart, Curve, Drawing, last_value
from mlxchat.report.published import GPT_CORE
from mlxchat.report.scorecard import Column, columns, passes, task_names
from mlxchat.report.wording import baseline_label, format_bytes, format_count


@dataclass(frozen=True, kw_only=True)
class _Series:
    """What a step may log and how it is drawn."""

    key: str
    title: str
    y: str
    show: Callable[[float], str] = "{:.3f}".format
    scale: float = 1.0
    is_smoothed: bool = False
    from_zero: bool = True


_AFTERWARDS = (
    _Series(key="lr_multiplier", title="learning rate", y="× the peak rate"),
    _Series(key="grad_norm", title="gradient norm", y="before clipping", is_smoothed=True),
    _Series(key="tokens_per_second", title="throughput", y="tokens/s", show=lambda v: f"{format_count(v)}/s"),
    _Series(key="peak_memory_bytes", title="memory", y="peak so far, GB", scale=1e-9,
            show=lambda v: format_bytes(v * 1e9)),
    _Series(key="data_wait_frac", title="waiting for data", y="% of the time", scale=100, show="{:.1f}%".format),
)  # fmt: skip
_LOSS = _Series(
    key="loss", title="training loss (bold: smoothed)", y="nats per token", is_smoothed=True, from_zero=False
)
_TEACHER = (
    _Series(key="ce", title="cross-entropy (bold: smoothed)", y="nats per token", is_smoothed=True, from_zero=False),
    _Series(key="kl", title="divergence from the teacher", y="nats per token", is_smoothed=True),
)
_VALIDATION = (
    _Series(key="val_bpb", title="validation", y="bits per byte", from_zero=False),
    _Series(key="val_loss", title="validation", y="nats per token", from_zero=False),
    _Series(key="val_perplexity", title="validation", y="perplexity", from_zero=False),
    _Series(key="perplexity", title="validation", y="perplexity", from_zero=False),
    _Series(
        key="core_estimate",
        title="CORE estimate",
        y="mean centred accuracy",
        show="{:.4f}".format,
        from_zero=False,
    ),
    _Series(key="mean_centered", title="accuracy on tasks", y="mean centred accuracy", from_zero=False),
)
_REWARD = (
    _Series(key="reward", title="mean reward (bold: smoothed)", y="per sampled answer", is_smoothed=True,
            from_zero=False),
    _Series(key="held_out_reward", title="held-out reward", y="per sampled answer", from_zero=False),
    _Series(key="teaching_frac", title="questions with answers of unequal reward", y="% of the asked", is_smoothed=True,
            scale=100, show="{:.0f}%".format),
    _Series(key="completion_tokens", title="length of answers", y="tokens", is_smoothed=True,
            show="{:.1f}".format),
    _Series(key="entropy", title="entropy of the policy", y="nats per token"),
    _Series(key="kl", title="divergence from the model that RL began with", y="nats per token"),
    _Series(key="clip_frac", title="clipped tokens", y="% of the sampled", scale=100, show="{:.1f}%".format),
)  # fmt: skip


def step_charts(report: RunReport, step: StepReport) -> list[Drawing]:
    """Return the curves of a training step: what it aimed at first, then how it went; none for other steps."""
    if not (step.series("loss")[0] or step.series("reward")[0]):
        return []
    is_rl = bool(step.series("reward")[0])
    charts: list[Drawing] = []
    for series in _REWARD if is_rl else (_LOSS, *_TEACHER):
        charts += _chart(step, series)
    if is_rl:
        charts += _pass_chart(step)
    for series in _VALIDATION:
        levels = list(bpb_baselines(report, step).items()) if series.key == "val_bpb" else []
        charts += _chart(step, series, levels)
    for series in _AFTERWARDS:
        charts += _chart(step, series)
    return charts


def score_charts(report: RunReport) -> list[Drawing]:
    """Return the pictures of what the evals measured."""
    chosen = columns(report)
    chats = [column for column in chosen if column.scores and column.scores.tasks]
    return [*_accuracy(chats), *_core_tasks(chosen), *_core_ladder(chosen)]


def all_charts(report: RunReport) -> list[Drawing]:
    """Return every picture of a run, those of the scores first."""
    return [*score_charts(report), *(chart for step in report.steps for chart in step_charts(report, step))]


def _chart(step: StepReport, series: _Series, levels: list[tuple[str, float]] | None = None) -> Iterator[Chart]:
    xs, ys = step.series(series.key)
    if not xs or (series.key == "data_wait_frac" and _is_negligible(ys)):
        return
    ys = [y * series.scale for y in ys]
    curve = Curve(points=(xs, ys), is_smoothed=series.is_smoothed)
    end = series.show(last_value(curve))
    title = series.title.partition(" (")[0]
    said = f"{title} of step {step.name} over its iterations, {series.y}: it ends at {end}"
    said += "".join(f"; {label} {value:.4g}" for label, value in levels or [])
    yield Chart(
        name=f"{slug(step.name)}-{slug(series.key)}",
        title=f"{step.name}: {series.title}",
        alt=f"Curve of the {said}.",
        y=series.y,
        curves=[Curve(points=(xs, ys), is_smoothed=series.is_smoothed, end=end)],
        levels=levels or [],
        from_zero=series.from_zero,
    )


def _is_negligible(shares: list[float]) -> bool:
    """Tell whether a training never waited, but for its beginning."""
    return max(shares[max(1, len(shares) // 10) :], default=0.0) < 0.02


def _pass_chart(step: StepReport) -> Iterator[Chart]:
    curves, said = [], []
    for position, k in enumerate(passes(step)):
        xs, ys = step.series(f"pass_at_{k}")
        end = f"@{k} {100 * ys[-1]:.0f}%"
        curves.append(Curve(points=(xs, [100 * y for y in ys]), colour=position % COLOURS, end=end))
        said.append(f"pass@{k} ends at {100 * ys[-1]:.1f}%")
    if curves:
        yield Chart(
            name=f"{slug(step.name)}-pass",
            title=f"{step.name}: pass@k on held-out problems",
            alt=f"Curves of step {step.name}: {'; '.join(said)}.",
            y="% of problems",
            curves=curves,
            from_zero=True,
        )


def bpb_baselines(report: RunReport, step: StepReport) -> dict[str, float]:
    """Return label to bits per byte of what a step's validation curve may be compared with."""
    # Only an eval of this checkpoint on the corpus that it was trained on measures the same text.
    corpus = step.inputs.get("corpus")
    for other in report.evals:
        same = checkpoint_name(other) == step.name and corpus and other.inputs.get("corpus") == corpus
        if same and other.scores and other.scores.baselines:
            return {baseline_label(name): value for name, value in other.scores.baselines.items()}
    return {}


def _accuracy(chosen: list[Column]) -> Iterator[Bars]:
    tasks = task_names(chosen)
    if not tasks:
        return
    rows: list[tuple[str, list[Bar | None], list[float]]] = []
    for task in tasks:
        results = [column.scores.tasks.get(task) if column.scores else None for column in chosen]
        cells = [
            Bar(value=100 * r.accuracy, error=100 * (r.stderr or 0), colour=i % COLOURS)
            if r and r.accuracy is not None
            else None
            for i, r in enumerate(results)
        ]
        # A chance of nothing is the axis itself.
        rows.append((task, cells, sorted({100 * r.chance for r in results if r and r.chance})))
    labels = [column.label for column in chosen]
    yield Bars(
        name="accuracy",
        title="Accuracy on each task",
        alt=f"Bars of the accuracy on {', '.join(tasks)} for {', '.join(labels)}, with chance marked.",
        x="% of questions right, ± one standard error",
        rows=rows,
        labels=labels,
        mark="chance",
    )


def _core_tasks(chosen: list[Column]) -> Iterator[Bars]:
    measured = [column for column in chosen if column.scores and column.scores.core]
    names = list(dict.fromkeys(task for c in measured if c.scores and c.scores.core for task in c.scores.core.tasks))
    if not names:
        return
    rows: list[tuple[str, list[Bar | None], list[float]]] = []
    for name in names:
        cells: list[Bar | None] = []
        for position, column in enumerate(measured):
            task = column.scores.core.tasks.get(name) if column.scores and column.scores.core else None
            known = task is not None and task.centered is not None
            cells.append(
                Bar(value=task.centered, error=task.centered_stderr or 0, colour=position % COLOURS)  # type: ignore[union-attr, arg-type]
                if known
                else None
            )
        rows.append((name, cells, []))
    labels = [column.label for column in measured]
    yield Bars(
        name="core-tasks",
        title=f"CORE: its {len(names)} tasks",
        alt=f"Bars of the centred accuracy on each of CORE's tasks for {', '.join(labels)}.",
        x="centred accuracy: 0 is guessing, 1 is perfect",
        rows=rows,
        labels=labels if len(labels) > 1 else [],
    )


def _core_ladder(chosen: list[Column]) -> Iterator[Bars]:
    ours = [(c.label, c.scores.core) for c in chosen if c.scores and c.scores.core and c.scores.core.value is not None]
    if not ours:
        return
    rows = [(label, Bar(value=core.value or 0, error=core.stderr or 0)) for label, core in ours]
    rows += [(f"{name} (published)", Bar(value=value, colour=COLOURS)) for name, value in GPT_CORE.items()]
    rows.sort(key=lambda row: row[1].value)
    said = ", ".join(f"{name} {bar.value:.4f}" for name, bar in rows)
    yield Bars(
        name="core",
        title="CORE beside GPT-2",
        alt=f"Bars of CORE: {said}.",
        x="CORE; grey: published elsewhere, not measured here",
        rows=[(name, [bar], []) for name, bar in rows],
        labels=[],
        has_values=True,
    )


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
