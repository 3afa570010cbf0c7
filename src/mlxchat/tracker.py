"""Metrics to a tracking service besides metrics.jsonl: Weights & Biases or Trackio, whose interfaces are alike."""

from __future__ import annotations

import importlib
from typing import Any

from mlxchat.config import TrackerConfig
from mlxchat.errors import ConfigError


class Tracker:
    """One tracked run. With kind 'none' every call does nothing."""

    def __init__(self, config: TrackerConfig, run: str, settings: dict[str, Any]) -> None:
        """Begin to track.

        Raises:
            ConfigError: the tracker's package is not installed.
        """
        self._service: Any = None
        if config.kind == "none":
            return
        try:
            self._service = importlib.import_module(config.kind)
        except ImportError:
            raise ConfigError(
                f"tracker={config.kind} needs its package: pip install {config.kind} (or choose tracker=none)"
            ) from None
        self._service.init(project=config.project, name=run, config=settings)

    def log(self, step: str, record: dict[str, Any]) -> None:
        """Pass a metrics record on, its numbers named <step>/<key>."""
        if self._service is not None:
            self._service.log({f"{step}/{key}": value for key, value in record.items()})

    def finish(self) -> None:
        """End the tracked run."""
        if self._service is not None:
            self._service.finish()
