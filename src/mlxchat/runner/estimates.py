"""What a step will take, by the artifacts of its stage that there are: the nearest one's time and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from mlxchat.config.wording import format_bytes, format_seconds
from mlxchat.runner.plan import PlannedStep
from mlxchat.runner.reasons import nearest_of
from mlxchat.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an artifact like the one to be made took."""

    seconds: float
    bytes: int
    artifact: str
    """Name of the artifact that it is taken from."""

    def __str__(self) -> str:
        """Return it for people."""
        return f"~{format_seconds(self.seconds)}, {format_bytes(self.bytes)}"


def estimate_steps(plan: list[PlannedStep], store: Store) -> dict[str, Estimate | None]:
    """Return step → estimate of the steps that are not done; None where the store has nothing like what they make.

    The nearest artifact is the one of the same stage and label (a model's size, a corpus) that differs in the fewest
    config keys: what a small model took says nothing of a large one.
    """
    found: dict[str, Estimate | None] = {}
    for step in plan:
        if step.done:
            continue
        made = (made for made in store.recent(step.stage.name) if made["name"].rpartition("-")[0] == step.title)
        nearest = nearest_of(step.identity, made)
        found[step.name] = None
        if nearest is not None:
            size = sum(file["bytes"] for file in nearest["outputs"])
            found[step.name] = Estimate(seconds=nearest["seconds"], bytes=size, artifact=nearest["name"])
    return found
