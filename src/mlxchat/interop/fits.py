"""Which models of ours another format can express, and why not the others."""

from __future__ import annotations

from dataclasses import asdict, replace

from mlxchat.errors import ConfigError
from mlxchat.interop.names import architecture_values
from mlxchat.model.sizes import GPTSizes

_WORDS = {
    "value_embeddings": "value embeddings",
    "residual_scalars": "residual scalars",
    "smear": "the smear",
    "backout": "the backout",
}
# Fields of an architecture that do not change what is computed within the context.
_NO_COMPUTATION = ("architecture", "window_pattern")


def beyond_october(sizes: GPTSizes) -> list[str]:
    """Return in words what a model computes within its context that nanochat's of October 2025 does not.

    The base of the rotary positions does not count.
    """
    found = [words for name, words in _WORDS.items() if getattr(sizes, name)]
    if any(window is not None and window < sizes.context_tokens for window in sizes.windows()):
        found.append(f"sliding windows ({sizes.window_pattern})")
    if sizes.query_key_scale != 1.0:
        found.append(f"queries and keys scaled by {sizes.query_key_scale:g}")
    if sizes.padded_vocab_size != sizes.vocab_size:
        found.append(f"tables padded to {sizes.padded_vocab_size:,} rows")
    return found


def check_hf(sizes: GPTSizes) -> None:
    """Refuse what transformers' NanoChatForCausalLM cannot express.

    Raises:
        ConfigError: with what works instead.
    """
    if more := beyond_october(sizes):
        raise ConfigError(
            f"transformers' NanoChatForCausalLM is nanochat's model of October 2025. This one has more: {_list(more)}. "
            "What works instead: --to mlx (mlx-lm with --trust-remote-code), or --to nanochat"
        )


def nanochat_snapshot(sizes: GPTSizes) -> str:
    """Return whose code computes a model: oct2025 or jul2026.

    Raises:
        ConfigError: neither does; with the reason, and what works instead.
    """
    october, july = architecture_values("oct2025"), architecture_values("jul2026")
    differing = {}
    for name, values in (("oct2025", october), ("jul2026", july)):
        # Rows that pad the tables are the same ones however their number was chosen.
        ours = {**asdict(sizes), "vocab_multiple": values["vocab_multiple"]}
        differing[name] = [key for key in values if key not in _NO_COMPUTATION and ours[key] != values[key]]
        if replace(sizes, vocab_multiple=values["vocab_multiple"]).padded_vocab_size != sizes.padded_vocab_size:
            differing[name].append("padded_vocab_size")
    if not beyond_october(sizes) and sizes.rope_theta == october["rope_theta"]:
        return "oct2025"
    if not differing["jul2026"]:
        return "jul2026"
    nearest = min(differing, key=lambda name: len(differing[name]))
    values = architecture_values(nearest)
    wrong = [f"{key} {getattr(sizes, key)} instead of {values.get(key, 'its own')}" for key in differing[nearest]]
    wrong += [] if nearest == "jul2026" else [more for more in beyond_october(sizes) if "windows" in more]
    raise ConfigError(
        f"nanochat's code has these fixed and this model has them otherwise than {nearest}: {_list(wrong)}. "
        f"What works instead: --to mlx{'' if beyond_october(sizes) else ' or --to hf'}"
    )


def _list(parts: list[str]) -> str:
    return ", ".join(parts)
