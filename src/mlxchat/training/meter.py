"""Smoothed loss, speed and memory of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxchat.runner.progress import format_bytes, format_count

_EMA_DECAY = 0.9


class Meter:
    """What is logged and shown of a training."""

    def __init__(
        self,
        *,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        raise_peak: Callable[[float], float] = lambda rate: rate,
    ) -> None:
        """Begin at nothing.

        Args:
            flops_per_token: of training, as nanochat counts them.
            peak_flops: FLOP/s that the device can do; None: unknown, and so is the utilisation (MFU).
            raise_peak: called with a rate above `peak_flops`, which then was measured too low; returns the new peak.
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
        """Count one iteration.

        Args:
            loss: of its batch; None: its step was left out, and its loss is no number.
            tokens: of its batch.
            seconds: that it took.
            waited: seconds of these that it waited for data.
        """
        if loss is not None:
            self._ema = _EMA_DECAY * self._ema + (1 - _EMA_DECAY) * loss
            self._weight = _EMA_DECAY * self._weight + (1 - _EMA_DECAY)
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited
        self._recent = [*self._recent[-9:], (tokens, seconds, waited)]

    def tokens_per_second(self) -> float:
        """Return the speed of the last ten iterations."""
        return sum(recent[0] for recent in self._recent) / max(1e-9, sum(recent[1] for recent in self._recent))

    def data_wait_frac(self) -> float:
        """Return the share of the last ten iterations' time that was spent waiting for data."""
        return sum(recent[2] for recent in self._recent) / max(1e-9, sum(recent[1] for recent in self._recent))

    def mfu(self) -> float | None:
        """Return the model's FLOP/s over the last ten iterations as a share of the peak, in [0, 1]; None: no peak."""
        if self._peak_flops is None:
            return None
        rate = self._flops_per_token * self.tokens_per_second()
        if rate > self._peak_flops:
            self._peak_flops = max(rate, self._raise_peak(rate))
        return rate / self._peak_flops

    def record(self, loss: float | None) -> dict[str, float]:
        """Return the numbers for metrics.jsonl."""
        mfu = self.mfu()
        return {
            **({} if loss is None else {"loss": loss}),
            "smooth_loss": self.loss,
            "tokens_per_second": self.tokens_per_second(),
            **({} if mfu is None else {"mfu": mfu}),
            "data_wait_frac": self.data_wait_frac(),
            "elapsed_seconds": self.seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
        }

    def show(self) -> dict[str, str]:
        """Return the numbers for the progress line."""
        mfu = self.mfu()
        return {
            "loss": f"{self.loss:.3f}",
            "speed": f"{format_count(self.tokens_per_second())} tok/s",
            **({} if mfu is None else {"mfu": f"{mfu:.0%}"}),
            "memory": format_bytes(mx.get_peak_memory()),
        }

    def state(self) -> dict[str, Any]:
        """Return what a resumed training continues with."""
        counted = {"tokens": self.tokens, "seconds": self.seconds, "waited": self.waited}
        return {"ema": self._ema, "weight": self._weight, **counted}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._ema, self._weight = state["ema"], state["weight"]
        self.tokens, self.seconds, self.waited = state["tokens"], state["seconds"], state["waited"]
