"""The one map of parameters and sizes between nanochat's files, Hugging Face's `NanoChatForCausalLM` and ours.

Ours bear nanochat's names. nanochat's compiled models have `_orig_mod.` in front of each; Hugging Face renames what
both have and knows the architecture of October 2025 only. No numbers move: nothing is permuted, transposed or scaled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mlxchat.errors import DataError
from mlxchat.model.sizes import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTSizes

COMPILED_PREFIX = "_orig_mod."
"""What torch.compile puts in front of every name."""
SOFT_CAP = 15.0
"""Logits of both architectures stay within ±15."""
HF_ARCHITECTURE = "NanoChatForCausalLM"
_HF_PARTS = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUR_PARTS = {theirs: ours for ours, theirs in _HF_PARTS.items()}
_HF_TABLES = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
_OUR_TABLES = {theirs: ours for ours, theirs in _HF_TABLES.items()}
_OUR_LAYER = re.compile(r"transformer\.h\.(\d+)\.(\w+\.\w+)\.weight")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)\.weight")
# nanochat's name of a size → ours, in the order in which it writes them.
_NANOCHAT_SIZES = {
    "sequence_len": "context_tokens",
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "n_embd": "width",
}
_HF_SIZES = {
    "max_position_embeddings": "context_tokens",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "hidden_size": "width",
}
# Parameters that only July 2026 has.
_LATER = ("value_embeds.", "resid_lambdas", "x0_lambdas", "smear_gate.", "smear_lambda", "backout_lambda")


def ours_from_nanochat(name: str) -> str:
    """Return our name of a parameter in nanochat's .pt file."""
    return name.removeprefix(COMPILED_PREFIX)


def hf_from_ours(name: str) -> str:
    """Return the name that `NanoChatForCausalLM` has for a parameter of ours.

    Raises:
        DataError: it has none: the architecture of July 2026.
    """
    layer = _OUR_LAYER.fullmatch(name)
    if name in _HF_TABLES:
        return _HF_TABLES[name]
    if layer is not None and layer[2] in _HF_PARTS:
        return f"model.layers.{layer[1]}.{_HF_PARTS[layer[2]]}.weight"
    raise DataError(f"{HF_ARCHITECTURE} has no parameter like {name}: it is nanochat's model of October 2025")


def ours_from_hf(name: str) -> str | None:
    """Return our name of a parameter of `NanoChatForCausalLM`, also of one that bears ours; None: it has none."""
    layer = _HF_LAYER.fullmatch(name)
    if name in _OUR_TABLES:
        return _OUR_TABLES[name]
    if layer is not None and layer[2] in _OUR_PARTS:
        return f"transformer.h.{layer[1]}.{_OUR_PARTS[layer[2]]}.weight"
    # mlx-lm's files, and our own, keep nanochat's names.
    kept = name in _HF_TABLES or _OUR_LAYER.fullmatch(name) or name.startswith(_LATER)
    return name if kept else None


def sizes_from_nanochat(model_config: Mapping[str, Any], names: Iterable[str], where: str) -> GPTSizes:
    """Return the sizes of a model of nanochat's.

    Args:
        model_config: of its meta_*.json.
        names: our names of its parameters, which tell the two architectures apart.
        where: what messages call it.

    Raises:
        DataError: a size is missing or impossible, or the parameters are neither architecture's.
    """
    given = list(names)
    found = {prefix for prefix in _LATER if any(name.startswith(prefix) for name in given)}
    if found and len(found) < len(_LATER):
        missing = ", ".join(prefix.rstrip(".") for prefix in _LATER if prefix not in found)
        raise DataError(
            f"{where} is of a nanochat between October 2025 and July 2026 (it has {', '.join(sorted(found))}, not "
            f"{missing}). How such a model computes is not recorded in its files; only those two are read."
        )
    architecture = "jul2026" if found else "oct2025"
    known = {"window_pattern", *_NANOCHAT_SIZES}
    unknown = sorted(model_config.keys() - known)
    if unknown:
        raise DataError(f"{where}: model_config has {', '.join(unknown)}, which no known nanochat writes")
    numbers = _numbers(model_config, _NANOCHAT_SIZES, where)
    features = architecture_values(architecture)
    pattern = model_config.get("window_pattern", features["window_pattern"] if not found else "L")
    if not isinstance(pattern, str) or not pattern or set(pattern.upper()) - {"S", "L"}:
        raise DataError(f"{where}: window_pattern is {pattern!r}, expected letters S and L")
    return _checked({**numbers, **features, "window_pattern": pattern.upper()}, where)


def nanochat_from_sizes(sizes: GPTSizes) -> dict[str, Any]:
    """Return the model_config that nanochat writes into meta_*.json for a model of these sizes."""
    config: dict[str, Any] = {theirs: getattr(sizes, ours) for theirs, ours in _NANOCHAT_SIZES.items()}
    return config if sizes.architecture == "oct2025" else {**config, "window_pattern": sizes.window_pattern}


def sizes_from_hf(config: Mapping[str, Any], where: str) -> GPTSizes:
    """Return the sizes that a config.json of `NanoChatForCausalLM` says, of mlx-lm's or of ours.

    Raises:
        DataError: a size is missing, or it computes otherwise than ours would.
    """
    numbers = _numbers({"num_key_value_heads": config.get("num_attention_heads"), **config}, _HF_SIZES, where)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DataError(f"{where}: rope_parameters is no JSON object")
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
        raise DataError(f"{where}: this is no model that ours computes: {', '.join(wrong)}")
    # Ours write what they have beyond October 2025 under the names of the fields.
    optional = {field.name for field in fields(GPTSizes)} - set(_HF_SIZES.values()) - {"rope_theta"}
    features = {key: config[key] for key in optional if key in config}
    theta = float(theta) if isinstance(theta, int) and theta < 1 << 53 else theta
    return _checked({**numbers, "rope_theta": theta, **features}, where)


def expected_shapes(sizes: GPTSizes) -> dict[str, tuple[int, ...]]:
    """Return our parameters by name, with their shapes, without making the model."""
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
        if sizes.has_value_embedding(layer):
            shapes[f"{place}.attn.ve_gate.weight"] = (sizes.num_kv_heads, VALUE_GATE_CHANNELS)
            shapes[f"value_embeds.{layer}.weight"] = (rows, sizes.kv_width)
    if sizes.residual_scalars:
        shapes |= {"resid_lambdas": (sizes.num_layers,), "x0_lambdas": (sizes.num_layers,)}
    if sizes.smear:
        shapes |= {"smear_gate.weight": (1, SMEAR_GATE_CHANNELS), "smear_lambda": (1,)}
    if sizes.backout:
        shapes["backout_lambda"] = (1,)
    return shapes


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
        raise DataError(f"{where}: {', '.join(wrong)}; expected whole numbers above 0")
    return {ours: config[theirs] for theirs, ours in names.items()}


def _checked(values: Mapping[str, Any], where: str) -> GPTSizes:
    try:
        sizes = GPTSizes(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if sizes.width % sizes.num_heads or sizes.num_heads % sizes.num_kv_heads or sizes.head_width % 2:
        raise DataError(
            f"{where}: a width of {sizes.width} with {sizes.num_heads} heads and {sizes.num_kv_heads} key/value heads "
            "is no model: heads must divide the width into even parts, key/value heads the heads"
        )
    return sizes
