"""What the routes share."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.serve.limits import Limits
from mlxchat.serve.metrics import Metrics
from mlxchat.serve.models import Models
from mlxchat.serve.prompts import Defaults
from mlxchat.serve.worker import Worker


@dataclass(frozen=True)
class Service:
    """Models, the worker that computes with them, and how they are asked."""

    models: Models
    worker: Worker
    limits: Limits
    defaults: Defaults
    metrics: Metrics = field(default_factory=Metrics)
