"""What a pretraining took to reach its target (pretrain.target_bpb): time, tokens, FLOPs and cost."""

from __future__ import annotations

from mlxchat.config.wording import format_count, format_dollars, format_seconds, plural
from mlxchat.evals.scores import mapping
from mlxchat.report.collect import StepReport


def describe_target(step: StepReport, cost_per_hour: float | None) -> str:
    """Return a sentence about a finished pretraining's target; "" if it had none.

    Time is that of training alone, without evaluations, reading and saving, as nanochat counts.
    """
    target = mapping(mapping(step.manifest.get("config")).get("pretrain")).get("target_bpb")
    if not isinstance(target, int | float):
        return ""
    iteration = next((x for x, bpb in zip(*step.series("val_bpb"), strict=True) if bpb <= target), None)
    seconds = None if iteration is None else _seconds_at(step, iteration)
    if iteration is None or seconds is None:
        return f"It did not reach its target, val_bpb ≤ {target:g}."
    costs = [format_seconds(seconds)]
    end = step.fact("num_iterations")
    for name, unit in (("total_tokens", "tokens"), ("total_flops", "FLOPs")):
        if end and (total := step.fact(name)):
            amount = total * iteration / end
            shown = format_count(amount) if unit == "tokens" else f"{amount:.2e}".replace("e+", "e")
            costs.append(f"{shown} {unit}")
    costs += filter(None, [format_dollars(seconds, cost_per_hour)])
    return (
        f"It reached its target, val_bpb ≤ {target:g}, after {plural(int(iteration), 'iteration')}: {', '.join(costs)}."
    )


def _seconds_at(step: StepReport, iteration: float) -> float | None:
    """Return the seconds of training until an iteration, by the nearest record before it, else after it."""
    before, total, at = 0.0, 0.0, None
    for x, seconds in zip(*step.series("elapsed_seconds"), strict=True):
        if at is not None and x > iteration:
            break
        total += seconds - before if seconds >= before else seconds  # the clock of an extension begins at 0
        before, at = seconds, x
    return total * iteration / at if at else None
