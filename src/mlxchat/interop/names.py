"""Names of parameters and sizes in nanochat and Hugging Face's `NanoChatForCausalLM`, and which models each supports.

Our names are nanochat's. nanochat's compiled models have the prefix `_orig_mod.`; Hugging Face uses other names and
supports only the architecture of October 2025. No tensor is permuted, transposed or scaled.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mlxchat.errors import ConfigError, DataError
from mlxchat.model.sizes import GPTSizes

COMPILED_PREFIX = "_orig_mod."
"""Prefix of all names in models compiled by torch.compile."""
SOFT_CAP = 15.0
"""Soft cap of the logits in both architectures."""
HF_ARCHITECTURE = "NanoChatForCausalLM"
_HF_PARTS = {
    "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_OUR_PARTS = {theirs: ours for ours, theirs in _HF_PARTS.items()}
_HF_TABLES = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
_OUR_TABLES = {theirs: ours for ours, theirs in _HF_TABLES.items()}
_OUR_LAYER = re.compile(r"transformer\.h\.(\d+)\.(\w+\.\w+)\.weight")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)\.weight")
# nanochat's name of a size → ours, in nanochat's order.
_NANOCHAT_SIZES = {
    "sequence_len": "context_tokens", "vocab_size": "vocab_size", "n_layer": "num_layers", "n_head": "num_heads",
    "n_kv_head": "num_kv_heads", "n_embd": "width",
}  # fmt: skip
_HF_SIZES = {
    "max_position_embeddings": "context_tokens", "vocab_size": "vocab_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "hidden_size": "width",
}  # fmt: skip
LATER = ("value_embeds.", "resid_lambdas", "x0_lambdas", "smear_gate.", "smear_lambda", "backout_lambda")
"""Beginnings of the parameters that only July 2026 has."""


def hf_from_ours(name: str) -> str:
    """Return the name of our parameter in `NanoChatForCausalLM`."""
    layer = _OUR_LAYER.fullmatch(name)
    if name in _HF_TABLES:
        return _HF_TABLES[name]
    if layer is not None and layer[2] in _HF_PARTS:
        return f"model.layers.{layer[1]}.{_HF_PARTS[layer[2]]}.weight"
    raise DataError(f"{HF_ARCHITECTURE}, nanochat's model of October 2025, has no parameter {name}")


def ours_from_hf(name: str) -> str | None:
    """Return our name of a parameter of `NanoChatForCausalLM`, which may already be ours; None: unknown."""
    layer = _HF_LAYER.fullmatch(name)
    if name in _OUR_TABLES:
        return _OUR_TABLES[name]
    if layer is not None and layer[2] in _OUR_PARTS:
        return f"transformer.h.{layer[1]}.{_OUR_PARTS[layer[2]]}.weight"
    # mlx-lm's files, and our own, keep nanochat's names.
    kept = name in _HF_TABLES or _OUR_LAYER.fullmatch(name) or name.startswith(LATER)
    return name if kept else None


def sizes_from_nanochat(model_config: Mapping[str, Any], names: Iterable[str], where: str) -> GPTSizes:
    """Return the sizes of a nanochat model from the `model_config` of its meta_*.json.

    `names` are ours of its parameters, which determine the architecture; `where` is the model's name in messages.
    """
    given = list(names)
    found = {prefix for prefix in LATER if any(name.startswith(prefix) for name in given)}
    if found and len(found) < len(LATER):
        missing = ", ".join(prefix.rstrip(".") for prefix in LATER if prefix not in found)
        raise DataError(
            f"{where} is from a version of nanochat between October 2025 and July 2026 (it has "
            f"{', '.join(sorted(found))}, not {missing}). Only these two architectures are supported."
        )
    if unknown := sorted(model_config.keys() - {"window_pattern", *_NANOCHAT_SIZES}):
        raise DataError(f"{where}: model_config has {', '.join(unknown)}, which no known nanochat writes")
    numbers = _numbers(model_config, _NANOCHAT_SIZES, where)
    features = architecture_values("jul2026" if found else "oct2025")
    pattern = model_config.get("window_pattern", features["window_pattern"] if not found else "L")
    if not isinstance(pattern, str) or not pattern or set(pattern.upper()) - {"S", "L"}:
        raise DataError(f"{where}: window_pattern is {pattern!r}, expected letters S and L")
    return _checked({**numbers, **features, "window_pattern": pattern.upper()}, where)


def nanochat_from_sizes(sizes: GPTSizes) -> dict[str, Any]:
    """Return the model_config of nanochat's meta_*.json for these sizes."""
    config: dict[str, Any] = {theirs: getattr(sizes, ours) for theirs, ours in _NANOCHAT_SIZES.items()}
    return config if sizes.architecture == "oct2025" else {**config, "window_pattern": sizes.window_pattern}


def sizes_from_hf(config: Mapping[str, Any], where: str) -> GPTSizes:
    """Return the sizes of a config.json of `NanoChatForCausalLM`, mlx-lm or mlxchat; DataError if unsupported."""
    numbers = _numbers({"num_key_value_heads": config.get("num_attention_heads"), **config}, _HF_SIZES, where)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DataError(f"{where}: rope_parameters is not a JSON object")
    theta = config.get("rope_theta", rope.get("rope_theta", architecture_values("oct2025")["rope_theta"]))
    expected = {
        "hidden_act": ("relu2", config.get("hidden_act")),
        "final_logit_softcapping": (SOFT_CAP, config.get("final_logit_softcapping")),
        "logits_soft_cap": (SOFT_CAP, config.get("logits_soft_cap")),
        "attention_bias": (False, config.get("attention_bias")),
        "tie_word_embeddings": (False, config.get("tie_word_embeddings")),
        "intermediate_size": (4 * numbers["width"], config.get("intermediate_size")),
        "rope_type": ("default", rope.get("rope_type")),
    }
    wrong = [f"{key} {value} (expected {good})" for key, (good, value) in expected.items() if value not in (None, good)]
    if wrong:
        raise DataError(f"{where}: unsupported settings: {', '.join(wrong)}")
    # Our files have what goes beyond October 2025 under the names of the fields.
    optional = {field.name for field in fields(GPTSizes)} - set(_HF_SIZES.values()) - {"rope_theta"}
    features = {key: config[key] for key in optional if key in config}
    theta = float(theta) if isinstance(theta, int) and theta < 1 << 53 else theta
    return _checked({**numbers, "rope_theta": theta, **features}, where)


def expected_shapes(sizes: GPTSizes) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a model's parameters, without creating it."""
    rows, width = sizes.padded_vocab_size, sizes.width
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)}
    for layer in range(sizes.num_layers):
        place = f"transformer.h.{layer}"
        shapes |= {
            f"{place}.attn.c_q.weight": (width, width),
            f"{place}.attn.c_k.weight": (sizes.kv_width, width),
            f"{place}.attn.c_v.weight": (sizes.kv_width, width),
            f"{place}.attn.c_proj.weight": (width, width),
            f"{place}.mlp.c_fc.weight": (4 * width, width),
            f"{place}.mlp.c_proj.weight": (width, 4 * width),
        }
        if layer in sizes.value_embedding_layers:
            shapes[f"{place}.attn.ve_gate.weight"] = (sizes.num_kv_heads, sizes.value_gate_channels)
            shapes[f"value_embeds.{layer}.weight"] = (rows, sizes.kv_width)
    if sizes.residual_scalars:
        shapes |= {"resid_lambdas": (sizes.num_layers,), "x0_lambdas": (sizes.num_layers,)}
    if sizes.smear:
        shapes |= {"smear_gate.weight": (1, sizes.smear_gate_channels), "smear_lambda": (1,)}
    if sizes.backout:
        shapes["backout_lambda"] = (1,)
    return shapes


def check_tensors(found: Iterable[tuple[str, str | None, tuple[int, ...]]], sizes: GPTSizes, fault: str) -> None:
    """Raise a DataError unless tensors (their name, ours, shape) are exactly those of a model."""
    expected, seen, problems = expected_shapes(sizes), set(), []
    for theirs, ours, shape in found:
        if ours is None or ours not in expected:
            problems.append(f"{theirs} is unknown")
        elif ours in seen:
            problems.append(f"{theirs} is duplicate")
        elif shape != expected[ours]:
            problems.append(f"{theirs} is {list(shape)}, expected {list(expected[ours])}")
        seen.add(ours)
    problems += [f"{name} is missing" for name in expected.keys() - seen]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise DataError(f"{fault}: {'; '.join(sorted(problems)[:4])}{more}")


@cache
def architecture_values(name: str) -> dict[str, Any]:
    """Return the fields of GPTSizes that an architecture of conf/architecture/ sets."""
    values = yaml.safe_load(files("mlxchat.conf").joinpath("architecture", f"{name}.yaml").read_text(encoding="utf-8"))
    known = {field.name for field in fields(GPTSizes)}
    return {"architecture": values["name"], **{key: value for key, value in values.items() if key in known}}


def _numbers(config: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    wrong = [
        f"{key} is {config.get(key)!r}"
        for key in names
        if not isinstance(config.get(key), int) or isinstance(config.get(key), bool) or config[key] < 1
    ]
    if wrong:
        raise DataError(f"{where}: {', '.join(wrong)}; expected integers above 0")
    return {ours: config[theirs] for theirs, ours in names.items()}


def _checked(values: Mapping[str, Any], where: str) -> GPTSizes:
    try:
        sizes = GPTSizes(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if sizes.width % sizes.num_heads or sizes.num_heads % sizes.num_kv_heads or sizes.head_width % 2:
        raise DataError(
            f"{where}: width {sizes.width} with {sizes.num_heads} heads and {sizes.num_kv_heads} key/value heads is "
            "impossible: the width per head must be an even integer, and key/value heads must divide the heads"
        )
    return sizes


_WORDS = {
    "value_embeddings": "value embeddings", "residual_scalars": "residual scalars", "smear": "the smear",
    "backout": "the backout",
}  # fmt: skip
# Fields of an architecture that do not affect computation within the context.
_NO_COMPUTATION = ("architecture", "window_pattern")


def beyond_october(sizes: GPTSizes) -> list[str]:
    """Return descriptions of what a model computes within its context beyond nanochat's of October 2025.

    The base of the rotary embedding is not compared.
    """
    found = [words for name, words in _WORDS.items() if getattr(sizes, name)]
    if any(window is not None and window < sizes.context_tokens for window in sizes.windows):
        found.append(f"sliding windows ({sizes.window_pattern})")
    if sizes.query_key_scale != 1.0:
        found.append(f"queries and keys scaled by {sizes.query_key_scale:g}")
    if sizes.padded_vocab_size != sizes.vocab_size:
        found.append(f"tables padded to {sizes.padded_vocab_size:,} rows")
    return found


def check_hf(sizes: GPTSizes) -> None:
    """Raise a ConfigError unless transformers' NanoChatForCausalLM supports a model."""
    if more := beyond_october(sizes):
        raise ConfigError(
            f"transformers' NanoChatForCausalLM, nanochat's model of October 2025, does not support {', '.join(more)}. "
            "Use --to mlx (mlx-lm with --trust-remote-code) or --to nanochat"
        )


def nanochat_snapshot(sizes: GPTSizes) -> str:
    """Return the snapshot of nanochat that supports a model, oct2025 or jul2026; a ConfigError if neither does."""
    october, july = architecture_values("oct2025"), architecture_values("jul2026")
    differences = {
        "oct2025": beyond_october(sizes),
        "jul2026": [
            f"{key} {getattr(sizes, key)} instead of {value}"
            for key, value in july.items()
            if key not in (*_NO_COMPUTATION, "vocab_multiple") and getattr(sizes, key) != value
        ],
    }
    if sizes.rope_theta != october["rope_theta"]:
        differences["oct2025"].append(f"rope_theta {sizes.rope_theta} instead of {october['rope_theta']}")
    # Only the resulting number of rows matters, not how it was chosen.
    if replace(sizes, vocab_multiple=july["vocab_multiple"]).padded_vocab_size != sizes.padded_vocab_size:
        differences["jul2026"].append(f"tables of {sizes.padded_vocab_size:,} rows")
    if sizes.short_window is not None:
        differences["jul2026"].append(f"short_window {sizes.short_window}")
    nearest, wrong = min(differences.items(), key=lambda item: len(item[1]))
    if not wrong:
        return nearest
    raise ConfigError(
        f"nanochat's code does not support this model; differences from {nearest}: {', '.join(wrong)}. "
        f"Use --to mlx{'' if beyond_october(sizes) else ' or --to hf'}"
    )
