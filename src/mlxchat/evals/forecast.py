"""Memory forecast of an evaluation, without MLX."""

from __future__ import annotations

from mlxchat.config.schema import Config
from mlxchat.model.sizes import GPTSizes
from mlxchat.planning.memory import Decoding


def memory(config: Config, stage: str, sizes: GPTSizes) -> Decoding:
    """Return the decoding whose memory to predict; prompts are cropped to the context."""
    return Decoding(
        sizes=sizes,
        row_tokens=sizes.context_tokens + config.eval.max_new_tokens,
        remedies=("a smaller eval.max_new_tokens",),
    )
