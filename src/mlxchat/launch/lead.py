"""A run's ranks as the runner sees them: there when a step that computes with them begins, and not before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.errors import ConfigError, Interrupted, StepFailed
from mlxchat.launch.ranks import Ranks, current, start_here
from mlxchat.ops.machine import share_of_cores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlxchat.config import BatchConfig, MachineConfig
    from mlxchat.distributed.team import Team

_LIMITS = ("device", "compute_dtype", "memory_limit_bytes", "cache_limit_bytes", "wired_limit_bytes")


class Lead:
    """The ranks of one run, of which this process is the first."""

    def __init__(self, machine: MachineConfig, threads_given: int | None) -> None:
        """Start nothing yet.

        Args:
            machine: what the run's steps are told.
            threads_given: `machine.blas_threads` as the user wrote it.
        """
        self._machine, self._threads = machine, threads_given
        self._ranks = current()
        self._run: Any = None

    def remarks(self, batches: Mapping[str, BatchConfig]) -> list[str]:
        """Return a line for each step with fewer rows in an iteration than there are ranks.

        Args:
            batches: step → its iteration's tokens, as far as they are given.
        """
        size = self._ranks.size if self._ranks is not None else self._machine.num_processes
        rows = {step: batch.tokens // batch.row_tokens for step, batch in batches.items() if batch.tokens is not None}
        return [
            f"{step:<10} has {count} rows in an iteration for {size} ranks: some have nothing to train on"
            for step, count in rows.items()
            if count < size
        ]

    def start(self, run: Any, step: str) -> Team:
        """Return all ranks, ready for a step; those of this machine are started for the first one.

        Raises:
            StepFailed: that is not possible (any more).
            Interrupted: the run was asked to stop meanwhile.
        """
        ranks = self._ranks or start_here(
            self._machine.num_processes, run.folder, self._machine.blas_threads or 1, self._machine.device, run.say,
            lambda: _check_stop(run),
        )  # fmt: skip
        self._ranks = ranks
        if ranks.is_broken or ranks.team is None:
            loss = f"{ranks.watch.cause()}. " if ranks.watch.loss else ""
            raise StepFailed(f"{loss}All ranks have ended. The same command continues.")
        ranks.watch.on_stop = lambda: _stop(run)
        machine = {name: getattr(self._machine, name) for name in _LIMITS} | {"blas_threads": self._threads}
        neighbours = [ranks.on_host_of(rank) for rank in range(ranks.size)]
        from mlxchat.launch.begin import begin_step

        ranks.write(run.folder)
        ranks.team.call(begin_step, {"step": step, "machine": machine, "neighbours": neighbours})
        return ranks.team

    def explain(self, error: BaseException, work: Path) -> BaseException:
        """Return what is told of an error that ended a step: see `Ranks.explain`."""
        return error if self._ranks is None else self._ranks.explain(error, work)

    def describe(self) -> dict[str, Any] | None:
        """Return number, backend and hosts of the ranks; None: there are none yet."""
        return None if self._ranks is None else self._ranks.describe()

    def kill(self) -> None:
        """Kill what this process has started."""
        if self._ranks is not None:
            self._ranks.watch.kill()

    @property
    def is_broken(self) -> bool:
        """Tell whether nothing more can be computed together."""
        return self._ranks is not None and self._ranks.is_broken


def lead_ranks(machine: MachineConfig) -> tuple[MachineConfig, Lead | None]:
    """Return the machine's settings with its cores shared out, and the ranks; None: this process is to be alone.

    Raises:
        ConfigError: the settings do not go with the ranks that are there already.
    """
    ranks = current()
    if ranks is None and machine.num_processes == 1:
        return machine, None
    if ranks is not None:
        _check_use(ranks, machine)
    neighbours = ranks.on_host_of(0) if ranks is not None else machine.num_processes
    shared = replace(machine, blas_threads=machine.blas_threads or share_of_cores(neighbours))
    return shared, Lead(shared, machine.blas_threads)


def _check_use(ranks: Ranks, machine: MachineConfig) -> None:
    if machine.max_parallel_steps > 1:
        raise ConfigError(
            f"machine.max_parallel_steps is {machine.max_parallel_steps}, but the ranks of a run compute one step "
            "after the other"
        )
    if machine.num_processes not in (1, ranks.size):
        raise ConfigError(
            f"machine.num_processes is {machine.num_processes}, but there are {ranks.size} ranks already: leave it out"
        )


def _check_stop(run: Any) -> None:
    if run.stop_signal is not None:
        raise Interrupted("stopped before its ranks were there. The same command continues.", run.stop_signal)


def _stop(run: Any) -> None:
    """Have a run stop because another rank was asked to."""
    if run.stop_signal is None:
        run.request_stop(15)
        run.announce_stop()
