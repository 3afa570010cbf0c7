"""Measurements of a training for logs and display: loss, speed, memory, and warnings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import mlx.core as mx

from mlxchat.config.schema import TrainingConfig
from mlxchat.config.wording import format_bytes, format_count
from mlxchat.errors import StepFailed
from mlxchat.model.gpt import GPT, computing_in
from mlxchat.model.lora import adapters_of
from mlxchat.model.sizes import flops_per_token
from mlxchat.optim.optimizer import Rates
from mlxchat.planning.peak import peak_flops, raise_peak
from mlxchat.runner.context import Context
from mlxchat.runner.progress import Progress
from mlxchat.training.batches import Batch, BatchSource
from mlxchat.training.best import Best

_EMA_DECAY = 0.9
_WINDOW, _FEWEST_NORMS = 100, 10  # norms in the median, and the fewest for it
_WARNING_EVERY = 50  # iterations from one warning to the next
_MOST_DOCUMENTS_NAMED = 8
_VALIDATIONS = {"val_bpb", "val_loss"}
_WORSE_VALIDATIONS = 3  # in a row, before the warning of overfitting


class Monitor:
    """Measures, logs and shows each iteration of a step's training."""

    progress: Progress
    """The display of iterations."""

    def __init__(
        self, ctx: Context, model: GPT, batches: BatchSource, dtype: mx.Dtype, num_iterations: int, best: Best | None
    ) -> None:
        """Start at zero; `dtype` is what the model computes in, `best` the weights kept so far."""
        self.ctx, self.model, self.batches, self.best = ctx, model, batches, best
        self.dtype, self.num_iterations = dtype, num_iterations
        self.num_ranks = 1 if ctx.team is None else ctx.team.size
        # nanochat's FLOPs per token are those of a training of all weights.
        peak = peak_flops(dtype) if adapters_of(model) is None else None
        self.meter = Meter(
            flops_per_token=flops_per_token(model.sizes),
            peak_flops=peak and self.num_ranks * peak,
            raise_peak=lambda rate: self.num_ranks * raise_peak(dtype, rate / self.num_ranks),
        )
        self.watch, self.overfitting = Watch(ctx.config.training), Overfitting()
        self._began, self._waited, self._communication = 0.0, 0.0, 0.0

    def observe(self, done: int, title: str, measure: Callable[[int], dict[str, float]]) -> dict[str, float]:
        """Call `measure` after `done` iterations, in the dtype of training; log and return its numbers.

        The progress line shows `title` meanwhile.
        """
        if title:
            self.progress.update(done, now=title)
        with computing_in(self.model, self.dtype):
            numbers = measure(done)
        if self.best is not None:
            self.best.offer(done, numbers, self.model, is_last=done == self.num_iterations)
        if numbers:
            self.ctx.log({"iteration": done, **numbers})
            self.ctx.metrics.update(numbers)
        for name in _VALIDATIONS & numbers.keys():
            if (warning := self.overfitting.add(done, name, numbers[name], self.meter.loss)) is not None:
                self.progress.note(warning)
        return numbers

    def begin_iteration(self) -> None:
        """Start the clock."""
        self._began, self._waited = time.perf_counter(), self.batches.waited_seconds
        self._communication = self._communication_seconds()

    def end_iteration(
        self, iteration: int, batch: Batch, loss: float, norm: float, parts: Mapping[str, float], rates: Rates[float]
    ) -> None:
        """Count, log and show an iteration (from 1) with its loss, the norm of its gradients and the loss's terms.

        Raises:
            StepFailed: loss or norm is NaN or Inf, and `training.on_nan` ends the training.
        """
        ctx, seconds = self.ctx, time.perf_counter() - self._began
        good, record = math.isfinite(loss) and math.isfinite(norm), dict[str, Any]()
        if good:
            ctx.metrics |= parts
            warning = self.watch.warn(iteration, norm)
        else:
            warning = f"loss {loss} and gradient norm {norm}, batch of {_join(self.batches.documents())}"
            if self.watch.must_stop():
                raise StepFailed(
                    f"{ctx.step} stopped: iteration {iteration} of {self.num_iterations} gave {warning}. "
                    "With training.on_nan=skip such updates are skipped and the training continues."
                )
            warning += "; the update was skipped"
            record["skipped_iterations"] = self.watch.num_skipped
        self.meter.add(loss if good else None, batch.ids.size, seconds, self.batches.waited_seconds - self._waited)
        if warning is not None:
            self.progress.note(f"iteration {iteration}: {warning}")
            record["warning"] = warning
        if iteration % ctx.config.machine.log_every == 0 or iteration == self.num_iterations or record:
            record["lr_multiplier"] = rates.lr_factor
            if good:
                record |= {"grad_norm": norm, **parts}
            if self.num_ranks > 1:
                record["communication_frac"] = (self._communication_seconds() - self._communication) / seconds
            ctx.log({"iteration": iteration, **self.meter.record(loss if good else None), **record})
        best = self.best.show() if self.best is not None else {}
        self.progress.update(iteration, **self.meter.show(), **best, **self.watch.show(iteration))

    def finish(self) -> None:
        """Give the model its best weights, if they are kept, and write the training's totals to the step's metrics."""
        metrics, meter, best = self.ctx.metrics, self.meter, self.best
        if best is not None and best.iteration is not None:
            self.progress.note(
                f"kept the weights of iteration {best.iteration}: {best.metric} {best.numbers[best.metric]:.5f}"
            )
            metrics |= best.put_back(self.model, metrics)
        if self.watch.num_skipped or self.ctx.config.training.on_nan == "skip":
            metrics["skipped_iterations"] = self.watch.num_skipped
        metrics["loss"] = meter.loss
        metrics["tokens_per_second"] = meter.tokens / max(meter.seconds, 1e-9)
        metrics["data_wait_frac"] = meter.waited / max(meter.seconds, 1e-9)

    def state(self) -> dict[str, Any]:
        """Return what a resumed training continues with, as JSON data."""
        metrics = {name: value for name, value in self.ctx.metrics.items() if math.isfinite(value)}
        return {
            "meter": self.meter.state(), "watch": self.watch.state(), "overfitting": asdict(self.overfitting),
            "metrics": metrics,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; that of a finished training has no times and no norms."""
        self.meter.restore(state["meter"])
        if "watch" in state:
            self.watch.restore(state["watch"])
        if "overfitting" in state:
            self.overfitting = Overfitting(**state["overfitting"])

    def _communication_seconds(self) -> float:
        return 0.0 if self.ctx.team is None else self.ctx.team.group.traffic.seconds


class Meter:
    """The smoothed loss, the speed and the utilisation of a training."""

    def __init__(
        self,
        *,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        raise_peak: Callable[[float], float] = lambda rate: rate,
    ) -> None:
        """Start at zero.

        Args:
            flops_per_token: of training, as nanochat counts them.
            peak_flops: the device's FLOP/s; None: unknown, and so is the utilisation (MFU).
            raise_peak: called with a rate above `peak_flops`, which was measured too low; returns the new peak.
        """
        self._flops_per_token, self._peak_flops, self._raise_peak = flops_per_token, peak_flops, raise_peak
        self._ema, self._weight = 0.0, 0.0
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0
        self._recent: list[tuple[int, float, float]] = []

    @property
    def loss(self) -> float:
        """Debiased exponential mean of the loss (decay 0.9, as nanochat prints it)."""
        return self._ema / self._weight if self._weight else 0.0

    def add(self, loss: float | None, tokens: int, seconds: float, waited: float = 0.0) -> None:
        """Count an iteration; loss is None where its update was skipped, `waited` are its seconds of reading data."""
        if loss is not None:
            self._ema = _EMA_DECAY * self._ema + (1 - _EMA_DECAY) * loss
            self._weight = _EMA_DECAY * self._weight + (1 - _EMA_DECAY)
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited
        self._recent = [*self._recent[-9:], (tokens, seconds, waited)]

    def record(self, loss: float | None) -> dict[str, float]:
        """Return the numbers for metrics.jsonl; speeds are those of the last ten iterations."""
        mfu = self._mfu()
        return {
            **({} if loss is None else {"loss": loss}),
            "smooth_loss": self.loss,
            "tokens_per_second": self._per_second(0),
            **({} if mfu is None else {"mfu": mfu}),
            "data_wait_frac": self._per_second(2),
            "elapsed_seconds": self.seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
        }

    def show(self) -> dict[str, str]:
        """Return the numbers for the progress line."""
        mfu = self._mfu()
        return {
            "loss": f"{self.loss:.3f}",
            "speed": f"{format_count(self._per_second(0))} tok/s",
            **({} if mfu is None else {"mfu": f"{mfu:.0%}"}),
            "memory": format_bytes(mx.get_peak_memory()),
        }

    def _per_second(self, place: int) -> float:
        """Return tokens (0) or seconds of waiting (2) per second of the last ten iterations."""
        return sum(recent[place] for recent in self._recent) / max(1e-9, sum(recent[1] for recent in self._recent))

    def _mfu(self) -> float | None:
        """Return the model's FLOP/s as a share of the peak, in [0, 1]; None: no peak."""
        if self._peak_flops is None:
            return None
        rate = self._flops_per_token * self._per_second(0)
        if rate > self._peak_flops:
            self._peak_flops = max(rate, self._raise_peak(rate))
        return rate / self._peak_flops

    def state(self) -> dict[str, Any]:
        """Return what a resumed training continues with."""
        return {**self.loss_state(), "tokens": self.tokens, "seconds": self.seconds, "waited": self.waited}

    def loss_state(self) -> dict[str, float]:
        """Return what the smoothed loss continues with."""
        return {"ema": self._ema, "weight": self._weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; without times in it, speed is measured from here on."""
        self._ema, self._weight = state["ema"], state["weight"]
        if "seconds" in state:
            self.tokens, self.seconds, self.waited = state["tokens"], state["seconds"], state["waited"]


class Watch:
    """Handles NaN and warns of gradient norms; depends on its saved state only, so resuming changes nothing."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._norms: list[float] = []
        self._warned_at: int | None = None
        self._in_a_row = 0
        self.num_skipped = 0
        """Iterations whose update was skipped."""

    def must_stop(self) -> bool:
        """Count a step without finite numbers, which updated nothing; return whether training must end."""
        if self._config.on_nan == "stop":
            return True
        self._in_a_row += 1
        self.num_skipped += 1
        return self._in_a_row > self._config.max_skipped_in_a_row

    def warn(self, iteration: int, norm: float) -> str | None:
        """Add the norm of a good step; return a warning if it is far above the median, at most one a while."""
        self._in_a_row = 0
        usual = median(self._norms) if len(self._norms) >= _FEWEST_NORMS else math.inf
        self._norms = [*self._norms[1 - _WINDOW :], norm]
        factor = self._config.norm_warning_factor
        if factor is None or norm <= factor * usual or self._is_recent(iteration):
            return None
        self._warned_at = iteration
        return f"gradient norm {norm:.3g} is {norm / max(usual, 1e-30):.0f} times its recent median ({usual:.3g})"

    def show(self, iteration: int) -> dict[str, str]:
        """Return what the progress line shows: that there was a recent warning."""
        return {"warning": "gradient norm"} if self._is_recent(iteration) else {}

    def _is_recent(self, iteration: int) -> bool:
        return self._warned_at is not None and iteration - self._warned_at < _WARNING_EVERY

    def state(self) -> dict[str, Any]:
        """Return what a resumed training continues with."""
        counts = {"in_a_row": self._in_a_row, "skipped": self.num_skipped}
        return {"norms": self._norms, "warned_at": self._warned_at, **counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._norms, self._warned_at = state["norms"], state["warned_at"]
        self._in_a_row, self.num_skipped = state["in_a_row"], state["skipped"]


@dataclass
class Overfitting:
    """Warns once when validation rises while the training's loss falls."""

    best: float | None = None
    iteration: int = 0
    """Of the best validation."""
    loss: float = 0.0
    """Of the training, smoothed, at that time."""
    worse_in_a_row: int = 0
    told: bool = False

    def add(self, iteration: int, name: str, value: float, loss: float) -> str | None:
        """Add a validation; return a warning after three in a row that are worse than the best before them."""
        if self.best is None or value < self.best:
            self.best, self.iteration, self.loss, self.worse_in_a_row = value, iteration, loss, 0
            return None
        self.worse_in_a_row += 1
        if self.told or self.worse_in_a_row < _WORSE_VALIDATIONS or loss >= self.loss:
            return None
        self.told = True
        return (
            f"overfitting: since iteration {self.iteration} {name} has risen from {self.best:.4f} to {value:.4f}, "
            f"while the training's loss fell from {self.loss:.3f} to {loss:.3f}"
        )


def _join(names: list[str]) -> str:
    """Return the first few names in one line."""
    more = f" and {len(names) - _MOST_DOCUMENTS_NAMED} more" if len(names) > _MOST_DOCUMENTS_NAMED else ""
    return ", ".join(names[:_MOST_DOCUMENTS_NAMED]) + more
