"""The summary of a run for report and console: did it learn, how well, what did it cost, what next."""

import math
from collections import Counter
from collections.abc import Iterator
from statistics import linear_regression, pvariance

from mlxchat.config.wording import (
    format_bytes,
    format_count,
    format_dollars,
    format_seconds,
    format_time,
    join,
    plural,
    wrapped,
)
from mlxchat.errors import visible
from mlxchat.evals.scores import Measure, Scores, mapping, number
from mlxchat.report.collect import STAGE_LABELS, RunReport, StepReport, checkpoint_name
from mlxchat.report.tables import baseline_label, columns, computing_seconds, metric_table, shown

_FLAT = 0.01  # relative change of the validation loss over the last quarter
_FEWEST = 3  # validations to fit a line to
_GPT2_XL_CORE = 0.2565  # as published in the DCLM bundle
_SOLVED = 0.98  # mean accuracy from which on longer training is not advised


def answers(report: RunReport) -> list[tuple[str, str]]:
    """Return (question, answer) pairs, of at most four questions."""
    found = [
        ("Did it learn?", " ".join(filter(None, _learnt(report)))),
        ("How well?", " ".join(_how_well(report))),
        ("What did it cost?", " ".join(_cost(report))),
        ("What next?", " ".join(_next(report))),
    ]
    return [(question, answer) for question, answer in found if answer]


def facts(report: RunReport) -> list[tuple[str, str]]:
    """Return the known (name, value) pairs for the head of the report."""
    pretrain = next((s for s in report.steps if s.stage == "pretrain" and s.manifest), None)
    parameters, tokens = (num_parameters(pretrain), trained_tokens(pretrain)) if pretrain else (None, None)
    spent = computing_seconds(report)
    found = [
        ("parameters", "" if parameters is None else format_count(parameters)),
        ("pretraining tokens", "" if tokens is None else format_count(tokens)),
        ("computing time", "" if spent is None else format_seconds(spent)),
        ("cost", format_dollars(spent, report.cost_per_hour)),
    ]
    scored = _own_scores(report)
    if texts := [bpb for _, scores in scored if (bpb := scores.find("val_bpb"))]:
        found.append((texts[0].name, f"{min(bpb.value for bpb in texts):.3f}"))
    found += [(measure.name, shown(measure).text) for _, _, measure in _best_means(scored)]
    return [(what, value) for what, value in found if value]


def troubles(report: RunReport) -> list[str]:
    """Return sentences about errors and missing results."""
    failed = [step for step in report.steps if step.outcome == "failed"]
    lines = [_sentence(f"Step {step.name} failed", step.error) for step in failed]
    # The run's error is usually that of a failed step, which is listed already.
    if report.outcome == "failed" and not failed:
        lines.append(_sentence("This run failed", report.error))
    ends = {"unfinished": "begun and without a result (running, or stopped)", "missing": "without a result"}
    for outcome, words in ends.items():
        if names := [step.name for step in report.steps if step.outcome == outcome]:
            verb = "is" if len(names) == 1 else "are"
            lines.append(f"{join(names)} {verb} {words}.")
    return lines


def trained_tokens(step: StepReport) -> float | None:
    """Return the tokens of a training step, None if unknown."""
    batch, iterations = step.fact("tokens_per_iteration"), step.fact("num_iterations")
    return step.fact("total_tokens") or (batch * iterations if batch and iterations else None)


def num_parameters(step: StepReport) -> float | None:
    """Return the parameters of a checkpoint, from the manifest or counted in the weights."""
    return step.fact("num_parameters") or step.num_parameters


def print_summary(report: RunReport) -> None:
    """Print what was trained, how well, the table of scores, and what is missing."""
    experiment = f"experiment {report.experiment}" if report.experiment else ""
    counts = Counter(step.outcome for step in report.steps)
    states = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    details = [experiment, format_time(report.started), f"{plural(len(report.steps), 'step')}: {states}"]
    lines = [report.name, " · ".join(detail for detail in details if detail)]
    lines += [f"{question} {answer}" for question, answer in answers(report)]
    lines += troubles(report)
    for line in lines:
        print(wrapped(visible(line), 2))
    if metrics := metric_table(report):
        print(f"\n{metrics.text()}")


def _is_training(step: StepReport) -> bool:
    """Return True if a step trained a model; imports are checkpoints too."""
    return step.kind == "checkpoint" and (step.stage in STAGE_LABELS or bool(step.records))


def _own_scores(report: RunReport) -> list[tuple[str, Scores]]:
    """Return (checkpoint, scores) of models trained here; of third-party models if there are no others."""
    trained = {step.name for step in report.steps if _is_training(step)}
    scored = [(checkpoint_name(column.step), column) for column in columns(report)]
    own = [(name, column) for name, column in scored if name in trained]
    return [(name, column.scores) for name, column in own or scored if column.scores.measures]


def _best_means(scored: list[tuple[str, Scores]]) -> Iterator[tuple[str, Scores, Measure]]:
    """Yield (checkpoint, scores, measure) of the best CORE, and of the best ChatCORE or mean centred accuracy."""
    for metric in ("core", "chatcore", "mean_centered"):
        found = [(name, scores, measure) for name, scores in scored if (measure := scores.find(metric))]
        if found:
            yield max(found, key=lambda each: each[2].value)
        if found and metric == "chatcore":
            return


def _learnt(report: RunReport) -> Iterator[str]:
    for step in report.steps:
        if step.stage == "pretrain" and step.manifest:
            yield _trained(step)
            yield _target(step)
    texts = [(scores, bpb) for _, scores in _own_scores(report) if (bpb := scores.find("val_bpb"))]
    if texts:
        scores, bpb = min(texts, key=lambda each: each[1].value)
        others = scores.baselines
        beaten = [name for name, value in others.items() if bpb.value < value]
        verdict = "Yes" if len(beaten) == len(others) else "Partly" if beaten else "Hardly"
        begins = f"{verdict}: held-out" if others else "Held-out"
        beside = ", ".join(f"{baseline_label(name)} {value:.2f}" for name, value in others.items())
        yield f"{begins} text takes {bpb.value:.3f} bits per byte{f' ({beside})' if beside else ''}."
    tasks = [(name, scores.tasks) for name, scores in _own_scores(report) if scores.tasks]
    if tasks:
        name, measured = tasks[-1]
        above = [t.name for t in measured.values() if t.value > (t.chance or 0.0) + 2 * (t.stderr or 0.0)]
        which = f": {join(above)}" if 0 < len(above) < len(measured) else ""
        verb = "is" if len(above) == 1 else "are"
        yield f"After {name}, {len(above)} of {plural(len(measured), 'task')} {verb} clearly above chance{which}."


def _trained(step: StepReport) -> str:
    """Return a sentence about model size, tokens and time of a pretraining."""
    parameters, layers = num_parameters(step), number(step.model.get("num_hidden_layers"))
    size = f"{format_count(parameters)}-parameter model" if parameters else "model"
    depth = f" of {plural(int(layers), 'layer')}" if layers else ""
    tokens = trained_tokens(step)
    data = f" on {format_count(tokens)} tokens" if tokens else ""
    time = f" in {format_seconds(step.seconds)}" if step.seconds is not None else ""
    return f"Step {step.name} trained a {size}{depth}{data}{time}."


def _target(step: StepReport) -> str:
    """Return a sentence about the target of a pretraining (pretrain.target_bpb); "" if it had none."""
    metrics = mapping(step.manifest.get("metrics"))
    if "reached_target" not in metrics:
        return ""
    iterations, seconds = (number(metrics.get(name)) for name in ("iterations", "seconds_to_target"))
    if not metrics["reached_target"] or iterations is None or seconds is None:
        return "It did not reach its target."
    return f"It reached its target after {plural(int(iterations), 'iteration')}, {format_seconds(seconds)} of training."


def _how_well(report: RunReport) -> Iterator[str]:
    scored = _own_scores(report)
    for name, scores, best in _best_means(scored):
        said = _said(best)
        if best.metric == "core":
            yield f"CORE is {said}, after {name} (GPT-2 XL, as published: {_GPT2_XL_CORE})."
        elif best.metric == "chatcore":
            yield f"The best ChatCORE is {said}, after {name}."
        else:
            over = plural(len(scores.tasks), "task")
            yield f"The best mean centred accuracy over {over} is {said}, after {name} (0 is guessing, 1 is perfect)."
    if tasks := [task for _, scores in scored[-1:] for task in scores.tasks.values()]:
        best, worst = (choose(tasks, key=lambda task: task.centered or 0.0) for choose in (max, min))
        if best is not worst:
            yield f"Best at {best.name} ({_said(best)}), worst at {worst.name} ({_said(worst)})."


def _said(measure: Measure) -> str:
    cell = shown(measure)
    return f"{cell.text} {cell.detail}".strip()


def _cost(report: RunReport) -> Iterator[str]:
    spent = computing_seconds(report)
    if spent is None:
        yield f"None of the {plural(len(report.steps), 'step')} has a result yet."
        return
    devices = [device for step in report.steps if (device := mapping(step.manifest.get("device"))).get("name")]
    named = (f"{each['name']} ({each.get('backend')}, {each.get('cores')} cores)" for each in devices)
    places = f" on {join(dict.fromkeys(named))}" if devices else ""
    dollars = format_dollars(spent, report.cost_per_hour)
    memory = max((number(step.manifest.get("peak_memory_bytes")) or 0 for step in report.steps), default=0)
    details = [dollars, f"at most {format_bytes(memory)} of memory" if memory else ""]
    yield ", ".join(filter(None, [f"{format_seconds(spent)} of computing{places}", *details])) + "."
    cached = sum(step.outcome == "cached" for step in report.steps)
    if cached:
        this_run = f"; this run took {format_seconds(report.seconds)}" if report.seconds is not None else ""
        yield f"{cached} of {plural(len(report.steps), 'step')} came from the cache{this_run}."


def _next(report: RunReport) -> Iterator[str]:
    if report.outcome in ("failed", "unfinished") or any(step.outcome == "failed" for step in report.steps):
        yield "Run the same command again: it continues where this run ended."
        return
    falling = []
    for step in report.steps:
        xs, ys = step.series("val_bpb") if step.series("val_bpb")[0] else step.series("val_loss")
        if not _is_training(step) or len(ys) < 4:
            continue
        lowest = xs[ys.index(min(ys))]
        if ys[-1] > min(ys) * (1 + _FLAT):
            since = f"was lowest at iteration {lowest:,.0f} and rose since: train it less"
            yield f"The validation of {step.name} {since}." if lowest else f"{step.name} did not lower its validation."
        elif (fall := _fall(xs, ys)) > _FLAT:
            falling.append(f"{step.name} (by {fall:.1%} over its last quarter)")
    tasks = [task.value for _, scores in _own_scores(report)[-1:] for task in scores.tasks.values()]
    if falling and not (tasks and sum(tasks) / len(tasks) >= _SOLVED):
        yield f"Train longer: validation still fell at the end of {join(falling)}."
    last = next((step for step in reversed(report.steps) if _is_training(step) and step.manifest), None)
    if last is not None:
        yield f"Talk to it: `mlxchat chat {last.artifact or last.name}`"


def _fall(xs: list[float], ys: list[float]) -> float:
    """Return the relative fall of a line through the last quarter's values; 0 if it is not clear or they are too few.

    Clear: the slope is beyond two standard errors.
    """
    begin = 0.75 * xs[-1]
    xs, ys = [x for x in xs if x >= begin], [y for x, y in zip(xs, ys, strict=True) if x >= begin]
    if len(xs) < _FEWEST or len(set(xs)) < len(xs):
        return 0.0
    slope, level = linear_regression(xs, ys)
    squares = sum((y - level - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    error = math.sqrt(squares / (len(xs) - 2) / (pvariance(xs) * len(xs)))
    at = level + slope * begin
    return -slope * (xs[-1] - begin) / at if at > 0 and -slope > 2 * error else 0.0


def _sentence(claim: str, detail: str) -> str:
    return f"{claim}: {detail.strip()}".rstrip(" .:") + "."
