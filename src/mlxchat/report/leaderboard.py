"""When pretrainings reached a target: time, tokens, FLOPs and cost, as in nanochat's dev/LEADERBOARD.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlxchat.config.wording import ABSENT, format_count, format_dollars, format_seconds
from mlxchat.evals.scores import mapping
from mlxchat.report.collect import RunReport, StepReport, sequence, text

# Settings that say nothing of how a model was trained.
_NOT_SHOWN = ("outputs=", "stage=", "name=", "targets=", "machine", "tracker", "report.", "force=")


@dataclass(frozen=True)
class Target:
    """A held-out number of a pretraining: val_bpb (at most) or core (at least)."""

    metric: str
    value: float

    def __str__(self) -> str:
        """Return it for people."""
        return f"val_bpb ≤ {self.value:g}" if self.metric == "val_bpb" else f"CORE ≥ {self.value:g}"

    def is_reached(self, found: float) -> bool:
        """Return whether a number is as good as this or better."""
        return found <= self.value if self.metric == "val_bpb" else found >= self.value


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a pretraining took to reach a target."""

    step: StepReport
    iteration: float
    seconds: float
    """Of training: without evaluations, reading and saving, as nanochat counts."""
    val_bpb: float | None
    core: float | None
    run: RunReport

    @property
    def tokens(self) -> float | None:
        """Tokens trained on until then."""
        return self._share("total_tokens")

    @property
    def flops(self) -> float | None:
        """FLOPs until then, as nanochat counts them."""
        return self._share("total_flops")

    def _share(self, name: str) -> float | None:
        total, count = self.step.fact(name), self.step.fact("num_iterations")
        return total * self.iteration / count if total and count else None

    def costs(self) -> list[tuple[str, str]]:
        """Return (what, value) of time, tokens, FLOPs and cost, those known."""
        found = [
            ("time", format_seconds(self.seconds)),
            ("tokens", format_count(self.tokens) if self.tokens else ""),
            ("FLOPs", f"{self.flops:.2e}".replace("e+", "e") if self.flops else ""),
            ("cost", format_dollars(self.seconds, self.run.cost_per_hour)),
        ]
        return [(what, value) for what, value in found if value]


def target_of(step: StepReport) -> Target | None:
    """Return the target at which a pretraining was to end; None: it had none."""
    settings = mapping(mapping(step.manifest.get("config")).get("pretrain"))
    value = settings.get("target_bpb")
    return Target("val_bpb", float(value)) if isinstance(value, int | float) else None


def reach(run: RunReport, step: StepReport, target: Target, evals: Iterable[StepReport]) -> Reached | None:
    """Return when a finished pretraining first reached a target; None: never.

    It is looked for in the pretraining's curves, and CORE in `evals`, which may be of any models.
    """
    end = step.fact("num_iterations")
    xs, ys = step.series("val_bpb" if target.metric == "val_bpb" else "core_estimate")
    iteration = next((x for x, y in zip(xs, ys, strict=True) if target.is_reached(y)), None)
    scored = [each.scores for each in evals if each.scores and _checkpoint(each) == step.rid]
    core = next((measure.value for scores in scored if (measure := scores.find("core"))), None)
    if iteration is None and target.metric == "core" and core is not None and target.is_reached(core):
        iteration = end
    seconds = None if iteration is None else _seconds_at(step, iteration)
    if iteration is None or seconds is None:
        return None
    return Reached(
        step=step, iteration=iteration, seconds=seconds, val_bpb=_last(step, "val_bpb", iteration),
        core=core if core is not None and iteration == end else _last(step, "core_estimate", iteration), run=run,
    )  # fmt: skip


def _checkpoint(step: StepReport) -> str:
    """Return the id of the model that an evaluation scored."""
    return text(mapping(mapping(step.manifest.get("inputs")).get("checkpoint")).get("rid"))


def _last(step: StepReport, name: str, iteration: float) -> float | None:
    """Return the last value of a curve up to an iteration."""
    return next((y for x, y in zip(*map(reversed, step.series(name)), strict=True) if x <= iteration), None)


def _seconds_at(step: StepReport, iteration: float) -> float | None:
    """Return the seconds of training until an iteration, by the nearest record before it, else after it."""
    before, total, at = 0.0, 0.0, None
    for x, seconds in zip(*step.series("elapsed_seconds"), strict=True):
        if at is not None and x > iteration:
            break
        total += seconds - before if seconds >= before else seconds  # the clock of an extension begins at 0
        before, at = seconds, x
    return total * iteration / at if at else None


def rank(runs: Iterable[RunReport], target: Target | None) -> dict[str, list[Reached]]:
    """Return title → pretrainings that reached a target, the fastest first; each artifact counts once.

    Bits per byte are compared within one corpus and number of held-out tokens. Without a target, every target
    that one of the runs has is ranked.
    """
    runs = list(runs)
    evals = [step for run in runs for step in run.evals]
    steps = {step.rid: (run, step) for run in runs for step in run.steps if step.stage == "pretrain" and step.manifest}
    targets = [target] if target else [own for _, step in steps.values() if (own := target_of(step))]
    found: dict[str, list[Reached]] = {}
    for each in dict.fromkeys(targets):
        for run, step in steps.values():
            if (reached := reach(run, step, each, evals)) is not None:
                found.setdefault(f"{each}{_held_out(step) if each.metric == 'val_bpb' else ''}", []).append(reached)
    return {title: sorted(rows, key=lambda row: row.seconds) for title, rows in found.items()}


def _held_out(step: StepReport) -> str:
    corpus = mapping(mapping(step.manifest.get("inputs")).get("corpus")).get("artifact")
    tokens = mapping(mapping(step.manifest.get("config")).get("pretrain")).get("eval_tokens")
    return f" on {text(corpus)}, {format_count(tokens)} tokens" if isinstance(tokens, int) else f" on {text(corpus)}"


HEADER = ("time", "val_bpb", "CORE", "tokens", "FLOPs", "cost", "iterations", "settings", "device", "date", "commit")


def describe(row: Reached) -> dict[str, str]:
    """Return the cells of a row by HEADER and "run"; what is unknown is "-"."""
    manifest, costs = row.step.manifest, dict(row.costs())
    device, git = mapping(manifest.get("device")), mapping(manifest.get("git"))
    ranks = mapping(mapping(manifest.get("excluded")).get("ranks")).get("size")
    shown = [each for each in map(text, sequence(manifest.get("overrides"))) if not each.startswith(_NOT_SHOWN)]
    return dict.fromkeys(HEADER, ABSENT) | costs | {
        "val_bpb": ABSENT if row.val_bpb is None else f"{row.val_bpb:.5f}",
        "CORE": ABSENT if row.core is None else f"{row.core:.4f}",
        "iterations": f"{row.iteration:,.0f}",
        "settings": " ".join(shown) or ABSENT,
        "device": f"{ranks} × {text(device.get('name'))}" if ranks else text(device.get("name")) or ABSENT,
        "date": text(manifest.get("published"))[:10],
        "commit": text(git.get("commit"))[:7] + ("+" if git.get("dirty") else "") or ABSENT,
        "run": text(manifest.get("run")),
    }  # fmt: skip


def tables(found: Mapping[str, Sequence[Reached]]) -> str:
    """Return the rankings as Markdown tables; columns that no row fills are left out."""
    blocks = []
    for title, rows in found.items():
        cells = [describe(row) for row in rows]
        names = [name for name in (*HEADER, "run") if any(each[name] != ABSENT for each in cells)]
        lines = [["#", *names], ["---"] * (1 + len(names))]
        lines += [
            [str(n), *(each[name].replace("|", "\\|") for name in names)] for n, each in enumerate(cells, start=1)
        ]
        blocks.append("\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(blocks)
