"""Whether differences over seeds are more than chance, for jobs of sweeps and for experiments.

B. L. Welch (1947), The generalization of "Student's" problem when several different population variances are involved.

Runs that are equal but for their seeds are one experiment, which is kept, discarded or undecided. In the order of their
first runs, each experiment is compared with the best one kept before it, as in a search that goes on from what was kept
(karpathy/autoresearch). The baseline is the first that is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

from mlxchat.config.wording import Table, escape, plural
from mlxchat.errors import ConfigError, suggest
from mlxchat.report.document import Block
from mlxchat.report.plots import COLOURS, HEIGHT, INK, SOFT, WIDTH, Picture, finish, new_axes, one_line
from mlxchat.store.compare import Plan
from mlxchat.store.files import Records
from mlxchat.store.fingerprint import changes, flatten
from mlxchat.store.manifest import Manifest, read_manifest
from mlxchat.store.naming import experiment_of
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEEP, DISCARD, UNDECIDED, CRASH = "keep", "discard", "not decided", "crash"
_MOST_CHANGES = 3
_LETTERS = 7  # of a commit
CONFIDENCE = 0.95
MOST_SEEDS = 30
"""Further seeds that are worth a suggestion."""


# Statistics


@dataclass(frozen=True)
class Difference:
    """The difference of two means, new − old, and its confidence interval."""

    mean: float
    low: float
    high: float
    more_seeds: int | None = None
    """Seeds that both sides need further, if means and scatter stay as they are, until the interval leaves out 0; 0:
    it does; None: more than are worth it."""

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return the difference with its interval: -0.0213 [-0.0310, -0.0116]."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def compare_means(old: Sequence[float], new: Sequence[float]) -> Difference | None:
    """Return the difference of the means of two samples; None: one has fewer than two values, so no known scatter."""
    if min(len(old), len(new)) < 2:
        return None
    mean = fmean(new) - fmean(old)
    half = _half_width(old, new)
    if abs(mean) > half:
        return Difference(mean, mean - half, mean + half, 0)
    enough = (more for more in range(1, MOST_SEEDS + 1) if abs(mean) > _half_width(old, new, more))
    return Difference(mean, mean - half, mean + half, next(enough, None))


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of at least two values."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None


def _mean_of(values: Sequence[float]) -> str:
    """Return the mean of values and its standard error, if that is known."""
    error = standard_error(values)
    return f"{fmean(values):.4f}" + ("" if error is None else f" ± {error:.4f}")


def _half_width(old: Sequence[float], new: Sequence[float], more: int = 0) -> float:
    """Return half the width of Welch's interval, as if each sample had `more` values of the same variance."""
    sizes = [len(sample) + more for sample in (old, new)]
    squares = [variance(sample) / size for sample, size in zip((old, new), sizes, strict=True)]
    total = sum(squares)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(square**2 / (size - 1) for square, size in zip(squares, sizes, strict=True))
    return student_quantile(0.5 + CONFIDENCE / 2, freedom) * math.sqrt(total)


def student_quantile(share: float, freedom: float) -> float:
    """Return the value below which a `share` of at least 0.5 of Student's t lies; `freedom`: at least 1.

    With t = √freedom · tan a, the density of the angle a is proportional to cos(a)^(freedom − 1).
    """
    import numpy as np

    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(2 * share - 1, below / below[-1], angles)
    return math.sqrt(freedom) * math.tan(float(angle))


# Jobs of a sweep


@dataclass(frozen=True)
class Seeds:
    """Jobs of a sweep that differ in their seeds only."""

    title: str
    """The settings that differ from other jobs', as overrides."""
    values: list[float]


def group_seeds(jobs: Iterable[Mapping[str, Any]], metric: str | None, *, less_is_better: bool) -> list[Seeds]:
    """Return the jobs with a value of a metric by their settings but `seed`, the best mean first; [] without seeds."""
    groups: dict[str, Seeds] = {}
    jobs = [job for job in jobs if metric in job["metrics"]]
    keys = dict.fromkeys(key for job in jobs for key in job["settings"])
    telling = [key for key in keys if len({str(job["settings"].get(key)) for job in jobs}) > 1]
    for job in jobs if "seed" in telling else []:
        pairs = ((key, job["settings"].get(key, "")) for key in telling if key != "seed")
        title = " ".join(f"{key}={value}" for key, value in pairs) or "all jobs"
        groups.setdefault(title, Seeds(title, [])).values.append(job["metrics"][metric])
    return sorted(groups.values(), key=lambda group: fmean(group.values) * (1 if less_is_better else -1))


def table_of_seeds(groups: Sequence[Seeds], metric: str) -> Table:
    """Return a row for each group: mean ± standard error, and the difference from the first group."""
    rows = []
    for group in groups:
        difference = compare_means(groups[0].values, group.values) if group is not groups[0] else None
        told = "" if difference is None else str(difference)
        rows.append([group.title, str(len(group.values)), _mean_of(group.values), told])
    header = ["settings", "seeds", metric, f"difference from the first [{CONFIDENCE:.0%}]"]
    return Table(header=header, align="lrrr", rows=rows)


def why_no_best(groups: Sequence[Seeds]) -> str:
    """Return why the first group is not known to be better than the second; "": it is."""
    if len(groups) < 2:
        return "the jobs differ in their seeds only"
    difference = compare_means(groups[0].values, groups[1].values)
    told = f"{groups[0].title} and {groups[1].title}"
    if difference is None:
        return f"{told}: give both at least two seeds"
    if difference.is_decided:
        return ""
    more = difference.more_seeds
    advice = "too close to decide" if more is None else f"about {plural(more, 'more seed')} each would decide"
    return f"{told} differ by {difference}, which may be chance; {advice}"


# Experiments


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What equal runs with different seeds made."""

    name: str
    settings: Mapping[str, Any]
    """All that led to the artifacts but seeds: dotted keys, stages and the contents of code and data."""
    made: list[Manifest]
    """One manifest per artifact; empty: its runs have failed."""
    values: list[float]
    """The metric of each."""
    runs: list[str]
    """Names of the runs' folders."""

    @cached_property
    def mean(self) -> float:
        """The mean of the values."""
        return fmean(self.values)

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None: of fewer than two values."""
        return standard_error(self.values)

    def __str__(self) -> str:
        """Return the mean and its standard error."""
        return _mean_of(self.values) if self.values else "-"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of one experiment."""

    experiment: Experiment
    status: str
    """keep, discard, not decided or crash; the baseline is kept."""
    against: Experiment | None = None
    """The best that was kept before; None: this is the baseline."""
    difference: Difference | None = None
    """None: one of both has fewer than two values."""
    changes: str = ""
    """The first differences of settings from the baseline."""

    @property
    def more_seeds(self) -> str:
        """How many seeds both sides need further, if it is not decided."""
        if self.status != UNDECIDED:
            return ""
        if self.difference is None:
            return "at least 2 each"
        more = self.difference.more_seeds
        return f"more than {MOST_SEEDS}" if more is None else f"about {more}"


def find_experiments(store: Store, plans: Sequence[Plan], metric: str) -> list[Experiment]:
    """Return the experiments of runs, in the order of their first runs.

    `plans` are the name and steps of each run, oldest first; `metric` is STEP.METRIC. ConfigError: no run has it.
    """
    step_name, _, number = metric.rpartition(".")
    found: dict[str, Experiment] = {}
    for run, steps in plans:
        step = next((step for step in steps if step["step"] == step_name), None)
        if step is None:
            continue
        name = experiment_of(run)
        made = store.made(step["key"], step["rid"])
        if made is None:
            events = Records(store.outputs / "runs" / run / "events.jsonl").read()
            if any(event["event"] == "step_failed" for event in events):
                found.setdefault(f"crash {name}", Experiment(name=name, settings={}, made=[], values=[], runs=[run]))
            continue
        value = made["metrics"].get(number)
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        settings = _settings(store, made)
        group = f"{name} {sorted(settings.items(), key=str)}"
        one = found.setdefault(group, Experiment(name=name, settings=settings, made=[], values=[], runs=[]))
        one.runs.append(run)
        if made["rid"] not in [each["rid"] for each in one.made]:
            one.values.append(float(value))
            one.made.append(made)
    if not any(each.made for each in found.values()):
        made_by = ((step["step"], store.made(step["key"], step["rid"])) for _, steps in plans for step in steps)
        known = {f"{name}.{key}" for name, made in made_by if made is not None for key in made["metrics"]}
        raise ConfigError(f"no run has recorded {metric}.{suggest(metric, known)}")
    finished = {each.name for each in found.values() if each.made}
    return [each for each in found.values() if each.made or each.name not in finished]


def _settings(store: Store, made: Manifest) -> dict[str, Any]:
    """Return all that led to an artifact but seeds, its inputs included."""
    found = {
        **{key: value for key, value in flatten(made["config"]).items() if key not in ("seed", "data_seed")},
        "data_seed": made["data_seed"],
        **{f"pin {name}": value for name, value in made["pins"].items()},
        **{f"code {name}": value for name, value in made.get("code", {}).get("modules", {}).items()},
        f"version of {made['stage']}": made["version"],
    }
    for source in made["inputs"].values():
        place = store.find(source["rid"])
        found |= {"input": source["rid"]} if place is None else _settings(store, read_manifest(place))
    return found


def judge(experiments: Sequence[Experiment], baseline: str, *, less_is_better: bool) -> list[Verdict]:
    """Return a verdict on the baseline and on each later experiment, which are in the order of their runs.

    `baseline` is the name of one, or of a folder of its runs. ConfigError: none or several are called so.
    """
    named = [each for each in experiments if baseline in (each.name, *each.runs) and each.made]
    if len(named) != 1:
        told = ", ".join(dict.fromkeys(each.name for each in experiments)) or "none"
        if named:
            told = "; ".join(f"{each.runs[0]}: {_describe_changes(named[0], each) or 'the first'}" for each in named)
            told += "; name one by the folder of a run"
        raise ConfigError(f"--baseline {baseline}: {len(named)} experiments with a result are called so ({told})")
    best = named[0]
    verdicts = [Verdict(experiment=best, status=KEEP)]
    for each in experiments[experiments.index(best) + 1 :]:
        verdict = _judge(each, best, named[0], less_is_better=less_is_better)
        verdicts.append(verdict)
        if verdict.status == KEEP:
            best = each
    return verdicts


def _judge(new: Experiment, best: Experiment, baseline: Experiment, *, less_is_better: bool) -> Verdict:
    status, difference = CRASH, None
    if new.values:
        status, difference = UNDECIDED, compare_means(best.values, new.values)
        if difference is not None and difference.is_decided:
            status = KEEP if (difference.mean < 0) is less_is_better else DISCARD
    told = _describe_changes(baseline, new)
    return Verdict(experiment=new, status=status, against=best, difference=difference, changes=told)


def _describe_changes(old: Experiment, new: Experiment) -> str:
    if not new.made:
        return ""
    changed = [f"{key} {a} → {b}" for key, (a, b) in changes(old.settings, new.settings, "default").items()]
    further = len(changed) - _MOST_CHANGES
    return ", ".join(changed[:_MOST_CHANGES]) + (f", {further} more" if further > 0 else "")


def table_of_verdicts(verdicts: Sequence[Verdict], metric: str) -> Table:
    """Return a row per experiment: mean ± standard error, difference from the best kept before, verdict, changes."""
    rows = []
    for each in verdicts:
        one, against = each.experiment, each.against
        told = "" if each.difference is None else str(each.difference)
        verdict = ["", "baseline"] if against is None else [against.name, each.status]
        rows.append([one.name, str(len(one.values)), str(one), told, *verdict, each.more_seeds, each.changes])
    difference = f"difference [{CONFIDENCE:.0%}]"
    header = ["experiment", "seeds", metric, difference, "from", "verdict", "more seeds", "changed"]
    return Table(header=header, align="lrrrllll", rows=rows)


def describe_verdicts(verdicts: Sequence[Verdict], metric: str) -> dict[str, Any]:
    """Return the verdicts as plain data."""
    found = []
    for each in verdicts:
        one, difference = each.experiment, each.difference
        found.append({
            "name": one.name, "values": [*one.values], "artifacts": [made["name"] for made in one.made],
            "mean": one.mean if one.values else None, "stderr": one.error,
            "against": each.against and each.against.name,
            "difference": difference and [difference.mean, difference.low, difference.high],
            "more_seeds": difference and difference.more_seeds, "verdict": each.status, "changes": each.changes,
        })  # fmt: skip
    return {"metric": metric, "confidence": CONFIDENCE, "experiments": found}


def journal(verdicts: Sequence[Verdict]) -> Iterator[list[str]]:
    """Yield the rows of autoresearch's results.tsv: commit, val_bpb, memory_gb, status, description."""
    yield ["commit", "val_bpb", "memory_gb", "status", "description"]
    for each in verdicts:
        one = each.experiment
        if not one.made:
            yield ["-", "0.000000", "0.0", CRASH, one.name]
            continue
        commit = str(one.made[-1]["git"].get("commit") or "-")[:_LETTERS]
        memory = max(made.get("peak_memory_bytes") or 0 for made in one.made) / 1e9
        description = f"{one.name}: {each.changes}" if each.changes else one.name
        yield [commit, f"{one.mean:.6f}", f"{memory:.1f}", each.status, " ".join(description.split())]


def report_experiments(verdicts: Sequence[Verdict], metric: str) -> list[Block]:
    """Return the report of experiments: what was kept, the picture of the progress, the table."""
    kept = [each for each in verdicts if each.status == KEEP]
    count = Counter(each.status for each in verdicts[1:])
    order = [status for status in (KEEP, DISCARD, UNDECIDED, CRASH) if count[status]]
    told = ", ".join(f"{count[status]} {status}" for status in order) or "no experiment"
    first, last = kept[0].experiment, kept[-1].experiment
    return [
        f"# Experiments since {escape(first.name)}",
        f"{told}. Best kept: **{escape(last.name)}** with {escape(metric)} {escape(str(last))}; the baseline has "
        f"{escape(str(first))}. An experiment is kept or discarded if the {CONFIDENCE:.0%} interval (Welch) of its "
        "difference from the best kept before leaves out 0.",
        [draw_progress(verdicts, metric)],
        table_of_verdicts(verdicts, metric),
    ]


def draw_progress(verdicts: Sequence[Verdict], metric: str) -> Picture:
    """Return the picture of all experiments in their order, with standard errors, and the line of those kept."""
    shown = [each for each in verdicts if each.experiment.values]
    marks = {KEEP: (COLOURS[2], "o"), DISCARD: (SOFT, "x"), UNDECIDED: (COLOURS[1], "D")}

    def draw() -> Figure:
        from matplotlib.ticker import MaxNLocator

        figure, axes = new_axes(HEIGHT, 1.4 * WIDTH)
        for status, (colour, mark) in marks.items():
            at = [number for number, each in enumerate(shown) if each.status == status]
            means = [shown[number].experiment.mean for number in at]
            errors = [shown[number].experiment.error or 0.0 for number in at]
            if at:
                axes.errorbar(at, means, errors, color=colour, fmt=mark, capsize=2, linewidth=1.2, label=status)
        kept = [(number, each.experiment) for number, each in enumerate(shown) if each.status == KEEP]
        xs = [*(number for number, _ in kept), len(shown) - 1]
        axes.step(xs, [*(one.mean for _, one in kept), kept[-1][1].mean], where="post", color=COLOURS[2], linewidth=1.4)
        for number, one in kept:
            axes.annotate(
                one_line(one.name, 22), (number, one.mean), xytext=(4, 7), textcoords="offset points", rotation=25,
                fontsize=8.5, color=INK,
            )  # fmt: skip
        axes.margins(x=0.05, y=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        title = f"{len(kept) - 1} of {plural(len(shown) - 1, 'experiment')} kept"
        finish(figure, axes, title, "experiment", f"{metric} (mean ± error)")
        return figure

    said = "; ".join(f"{each.experiment.name} {each.experiment} ({each.status})" for each in shown)
    return Picture(name="progress", alt=f"Experiments in their order: {said}.", draw=draw)
