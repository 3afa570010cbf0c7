"""Watching the loss and the gradients' norm: what to do about NaN and Inf, and early warnings of trouble."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from mlxchat.config import TrainingConfig

# Norms that the median is taken over, and how many there must be before it says anything.
_WINDOW = 100
_FEWEST_NORMS = 10
# Iterations between two warnings: trouble lasts, and one line about it is enough.
_WARNING_EVERY = 50
_MOST_DOCUMENTS_NAMED = 8


class Watch:
    """Sees every iteration's loss and norm. All it decides follows from its state and them, so a resume repeats it."""

    def __init__(self, config: TrainingConfig) -> None:
        """Begin with nothing seen."""
        self._config = config
        self._norms: list[float] = []
        self._warned_at: int | None = None
        self._in_a_row = 0
        self.num_skipped = 0
        """Iterations whose update was left out."""

    def must_stop(self) -> bool:
        """Count a step that gave no finite numbers (and so did not update anything); tell whether training must end."""
        if self._config.on_nan == "stop":
            return True
        self._in_a_row += 1
        self.num_skipped += 1
        return self._in_a_row > self._config.max_skipped_in_a_row

    def warn(self, iteration: int, norm: float) -> str | None:
        """Take the norm of a good step; return a warning if it is far above what was usual, at most now and then."""
        self._in_a_row = 0
        usual = median(self._norms) if len(self._norms) >= _FEWEST_NORMS else math.inf
        self._norms = [*self._norms[1 - _WINDOW :], norm]
        factor = self._config.norm_warning_factor
        if factor is None or norm <= factor * usual:
            return None
        if self._is_recent(iteration):
            return None
        self._warned_at = iteration
        return f"gradient norm {norm:.3g} is {norm / max(usual, 1e-30):.0f} times its median of late ({usual:.3g})"

    def show(self, iteration: int) -> dict[str, str]:
        """Return what the progress line says: that there was a warning a while ago."""
        return {"warning": "gradient norm"} if self._is_recent(iteration) else {}

    def _is_recent(self, iteration: int) -> bool:
        return self._warned_at is not None and iteration - self._warned_at < _WARNING_EVERY

    def state(self) -> dict[str, Any]:
        """Return what a resumed training continues with."""
        return {
            "norms": self._norms,
            "warned_at": self._warned_at,
            "in_a_row": self._in_a_row,
            "skipped": self.num_skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._norms, self._warned_at = state["norms"], state["warned_at"]
        self._in_a_row, self.num_skipped = state["in_a_row"], state["skipped"]


def is_finite(loss: float, norm: float) -> bool:
    """Tell whether a step gave numbers; if not, `TrainStep` has updated nothing."""
    return math.isfinite(loss) and math.isfinite(norm)


def name_documents(names: list[str]) -> str:
    """Return the first few names of documents in one line."""
    more = f" and {len(names) - _MOST_DOCUMENTS_NAMED} more" if len(names) > _MOST_DOCUMENTS_NAMED else ""
    return ", ".join(names[:_MOST_DOCUMENTS_NAMED]) + more
