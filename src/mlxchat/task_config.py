"""The schema of one task of a mixture or a suite; `config.py` holds the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class TaskItem:
    """One task of a mixture or a suite."""

    task: str = field(default=MISSING, metadata={"external": "code"})
    """Name in mlxchat.tasks, or module:Class of your own."""
    split: str = "train"
    """train or test, or another of the task's splits."""
    size: int | None = None
    """Number of conversations; null: the task's own."""
    start: int = field(default=0, metadata={"since_default": 0})
    """The first conversation that is used, counted from 0."""
    stop: int | None = field(default=None, metadata={"since_default": None})
    """The first that is used no more; null: all to the end."""
    step: int = field(default=1, metadata={"since_default": 1})
    """Every step-th conversation is used."""
    epochs: int = 1
    """How often each conversation occurs in one pass over the mixture."""
    weight: float | None = field(default=None, metadata={"since_default": None})
    """Share of the mixture's conversations, relative to the weights of all its tasks; null: as epochs say."""
    path: str | None = field(default=None, metadata={"external": "file", "identity": False})
    """File of a task that reads one (jsonl, identity, a list of words)."""
    source: dict[str, str] = field(
        default_factory=dict, metadata={"identity": False, "external": "contents", "by": "mlxchat.tasks:contents_of"}
    )
    """Where a task gets its data: repository, revision, subset of the Hub; url, words, sha256."""
    fields: list[str] | None = None
    """Fields of the Factbook, for the tasks that ask about countries; null: the task's own."""
    options: dict[str, float | None] = field(default_factory=dict)
    """Further numbers that the task takes; null: the task's own."""
