"""What is known of an evaluation before it runs: the memory of its answers. Imports no MLX."""

from __future__ import annotations

from mlxchat.config.schema import Config
from mlxchat.model.sizes import GPTSizes
from mlxchat.planning.memory import Decoding


def memory(config: Config, stage: str, sizes: GPTSizes) -> Decoding:
    """Return what the memory of answering questions depends on; prompts are cropped to the context."""
    return Decoding(
        sizes=sizes,
        row_tokens=sizes.context_tokens + config.eval.max_new_tokens,
        remedies=("a smaller eval.max_new_tokens",),
    )
