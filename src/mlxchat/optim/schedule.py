"""Multipliers of the learning rate and Muon's momentum, as pure functions of the iteration."""

from __future__ import annotations


def lr_multiplier(
    iteration: int, num_iterations: int, *, warmup_frac: float, warmdown_frac: float, final_frac: float
) -> float:
    """Return the factor of every learning rate: linear up, constant, linear down to `final_frac`.

    Counterpart of `get_lr_multiplier` in nanochat's scripts; with warmdown_frac 1 it is chat_sft's 1 − it / N.

    Args:
        iteration: 0 … num_iterations − 1.
        num_iterations: iterations of the whole training.
        warmup_frac: share of iterations that rise from 1/(their number) to 1.
        warmdown_frac: share of iterations, at the end, that fall.
        final_frac: what the fall would reach at iteration `num_iterations`.
    """
    warmup = round(warmup_frac * num_iterations)
    warmdown = round(warmdown_frac * num_iterations)
    if iteration < warmup:
        return (iteration + 1) / warmup
    if iteration <= num_iterations - warmdown:
        return 1.0
    progress = (num_iterations - iteration) / warmdown
    return max(0.0, progress + (1 - progress) * final_frac)


def muon_momentum(iteration: int, *, start: float, end: float, warmup_iterations: int) -> float:
    """Return Muon's momentum, linear from `start` to `end` over the first iterations (nanochat: .85 → .95, 300)."""
    frac = min(iteration / warmup_iterations, 1.0) if warmup_iterations else 1.0
    return (1 - frac) * start + frac * end
