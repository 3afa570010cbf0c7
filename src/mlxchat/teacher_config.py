"""The schema of a teacher whose distributions are learnt; `config.py` holds the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class TeacherConfig:
    """A frozen model of the same vocabulary: loss = (1 − weight) × cross-entropy + weight × T² × KL(it ‖ model)."""

    path: str | None = field(default=MISSING, metadata={"external": "folder", "identity": False})
    """A folder that holds a checkpoint of ours, or that mlx-lm opens. What is in it counts, not where it lies."""
    artifact: str | None = field(default=MISSING, metadata={"identity": False, "artifact": "teacher"})
    """A checkpoint of the store: a step of the latest run, a folder's name, or the start of an id. What it stands for
    is an input, part of the identity."""
    weight: float = MISSING
    """Share of the divergence in the loss, above 0 to 1."""
    temperature: float = MISSING
    """T: both distributions are softened by it in the divergence."""
    top_k: int | None = MISSING
    """Only the teacher's so many likeliest tokens are matched one by one, all others together; null: every token."""

    @property
    def is_there(self) -> bool:
        """Whether there is a teacher."""
        return self.path is not None or self.artifact is not None


NO_TEACHER = TeacherConfig(path=None, artifact=None, weight=0.5, temperature=1.0, top_k=None)
"""Identities from before there were teachers have none."""
