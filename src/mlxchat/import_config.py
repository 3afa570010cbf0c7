"""The schema of imports; `config.py` holds the rest. Values stand in conf/settings/imported.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class ImportConfig:
    """A model of another make that becomes a checkpoint. The contents of its files count, not where they lie."""

    name: str = field(default=MISSING, metadata={"identity": False})
    """What the artifact is called."""
    format: str = field(default=MISSING, metadata={"external": "section", "by": "mlxchat.interop.importing:pins_of"})
    """nanochat (model_<step>.pt, meta_<step>.json, tokenizer.pkl) or hf (a folder of NanoChatForCausalLM);
    or adapter (adapters of mlx-lm's on the model that fills the step's role checkpoint)."""
    repository: str | None = field(default=MISSING, metadata={"identity": False})
    """A model of the Hugging Face Hub, <organisation>/<name>, or a folder in it, <organisation>/<name>/<folder>."""
    revision: str = field(default=MISSING, metadata={"identity": False})
    """Commit, tag or branch of the repository."""
    folder: str | None = field(default=MISSING, metadata={"identity": False})
    """A folder of this machine, instead of a repository."""
    step: int | None = field(default=MISSING, metadata={"identity": False})
    """Of nanochat's steps in one place, which; null: the last."""
    chat: bool | None = MISSING
    """Whether it has learnt to chat; null: what its files say."""
