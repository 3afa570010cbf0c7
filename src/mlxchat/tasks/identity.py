"""Who the model is. The bundled file speaks of mlxchat; `path` puts the user's own in its place."""

from __future__ import annotations

from pathlib import Path

from mlxchat.tasks.jsonl import Jsonl

IDENTITY_FILE = Path(__file__).with_name("identity.jsonl")


class Identity(Jsonl):
    """Conversations about the model itself, in the form of task jsonl."""

    name = "identity"

    def __init__(
        self,
        split: str,
        *,
        path: str | Path | None = None,
        size: int | None = None,
        seed: int = 0,
        held_out_frac: float = 0.1,
    ) -> None:
        """Read the bundled conversations, or those of `path`; the other options are those of task jsonl."""
        path = IDENTITY_FILE if path is None else path
        super().__init__(split, path=path, size=size, seed=seed, held_out_frac=held_out_frac)
