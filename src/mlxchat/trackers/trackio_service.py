"""Trackio: a SQLite file of this machine (TRACKIO_DIR), shown by `trackio show`, or a Space (TRACKIO_SPACE_ID)."""

from __future__ import annotations

from typing import Any

from mlxchat.trackers.service import Numbers, Results, TrackedRun


class TrackioService:
    """One Trackio run; its steps are the iterations of each of ours."""

    def __init__(self, run: TrackedRun) -> None:
        """Begin the run, or continue it.

        Raises:
            ImportError: trackio is not installed.
            Exception: what trackio raises.
        """
        import trackio

        self._trackio: Any = trackio
        settings = {**run.settings, "tags": run.tags} if run.tags else run.settings
        # Names that begin with an underscore are Trackio's own.
        settings = {name: value for name, value in settings.items() if not name.startswith("_")}
        self._run: Any = trackio.init(
            project=run.project, name=run.name, config=settings, resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Add a point to each of the step's curves."""
        self._run.log({f"{step}/{name}": value for name, value in numbers.items()}, step=iteration)

    def finish(self, results: Results) -> None:
        """Add final numbers and the table of metrics, and end the run."""
        final = {f"final/{step}/{name}": value for step, ns in results.numbers.items() for name, value in ns.items()}
        if final:
            self._run.log(final)
        if results.rows:
            data = [dict(zip(results.header, row, strict=True)) for row in results.rows]
            self._run.log({"metrics": self._trackio.Table(dataframe=None, columns=results.header,
                                                          data=[list(row.values()) for row in data])})  # fmt: skip
        self._run.finish()
