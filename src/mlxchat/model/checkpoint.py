"""Saves and loads model folders, which mlx-lm can open; only safe formats.

Files: model.safetensors with nanochat's parameter names, config.json with `model_type: nanochat` (as in mlx-lm), the
tokenizer's files, and checkpoint.json with facts of the training. mlx-lm supports the architecture of October 2025;
other folders have a model file, which mlx-lm uses with --trust-remote-code. A checkpoint of adapters has
adapters.safetensors and adapter_config.json instead of the weights, which are its base's.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.model.gpt import GPT, cast_parameters, flatten_parameters, set_parameters
from mlxchat.model.lora import read_adapters, rounding_of, write_adapters
from mlxchat.model.sizes import AdapterSizes, GPTSizes
from mlxchat.ops.attention import RMS_NORM_EPSILON
from mlxchat.ops.device import default_dtype
from mlxchat.store.bases import ADAPTER_KEY, describe_base, find_chain

# Fields of config.json for features beyond October 2025.
_FEATURES = [field.name for field in dataclasses.fields(GPTSizes) if field.default is not dataclasses.MISSING]
MODEL_FILE = "mlx_lm_nanochat.py"
"""The model's code for mlx-lm, in folders whose architecture mlx-lm lacks."""


def save_checkpoint(folder: Path, model: GPT, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write a model folder.

    Args:
        folder: an existing folder.
        model: its parameters are written reproducibly in float32.
        tokenizer: written beside the weights.
        facts: plain data for checkpoint.json: 'stage', 'format' ('base' or 'chat'), 'iterations', …
    """
    arrays = {name: np.asarray(value.astype(mx.float32)) for name, value in flatten_parameters(model).items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "mlx"})
    write_description(folder, model.sizes, tokenizer, facts)


def save_adapters(
    folder: Path,
    adapters: Mapping[str, mx.array],
    adapter_sizes: AdapterSizes,
    *,
    base: Path,
    sizes: GPTSizes,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
) -> None:
    """Write a model folder with adapters only, which refers to its base artifact.

    Args:
        folder: an existing folder.
        adapters: by name, in float32.
        adapter_sizes: of the adapters.
        base: folder of the artifact on which they were trained; it may have adapters, too.
        sizes: of the model.
        tokenizer: as in `save_checkpoint`.
        facts: as in `save_checkpoint`.

    Raises:
        StoreError: the base is not an artifact.
    """
    write_adapters(folder, adapters, adapter_sizes, num_layers=sizes.num_layers)
    about = {"base": describe_base(base), **rounding_of(adapter_sizes)}
    write_description(folder, sizes, tokenizer, {**facts, ADAPTER_KEY: about})


def write_description(folder: Path, sizes: GPTSizes, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write a model folder's files except the weights; see `save_checkpoint`."""
    config = config_of(sizes, tokenizer)
    if "model_file" in config:
        write_model_file(folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "checkpoint.json", facts)
    tokenizer.save(folder)


def write_model_file(folder: Path) -> None:
    """Copy MODEL_FILE to a folder."""
    shutil.copyfile(Path(__file__).with_name(MODEL_FILE), folder / MODEL_FILE)


def config_of(sizes: GPTSizes, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of config.json, as mlx-lm expects them."""
    features = _features(sizes)
    # Within the context, the architecture's name has no effect.
    known_to_mlx_lm = not features.keys() - {"architecture"}
    return {
        "model_type": "nanochat",
        "architectures": ["NanoChatForCausalLM"],
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.context_tokens,
        "rope_theta": sizes.rope_theta,
        "rms_norm_eps": RMS_NORM_EPSILON,
        **features,
        **({} if known_to_mlx_lm else {"model_file": MODEL_FILE}),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.assistant_end,
        "tie_word_embeddings": False,
    }


def load_checkpoint(folder: Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return the model, its tokenizer and the facts of checkpoint.json.

    Adapters are fused into the weights of their base, which must be in the same store.

    Raises:
        DataError: a file is missing or damaged, or weights and config do not match.
        StoreError: the base of an adapter is missing, or has other weights than it was trained on.
    """
    *above, whole = find_chain(folder)
    model, tokenizer, facts = _load_whole(whole)
    for each in reversed(above):
        sizes, _ = _read_description(each)
        if sizes != model.sizes:
            raise DataError(f"{each}: config.json differs from that of its base, {whole.name}")
        read_adapters(each, sizes).apply(model)
    if above:
        _, facts = _read_description(folder)
        tokenizer = _load_tokenizer(folder, model.sizes)
    return model, tokenizer, facts


def load_for_inference(folder: Path, dtype: mx.Dtype | None = None) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return `load_checkpoint`'s result with weights in a dtype; None: the default device's."""
    model, tokenizer, facts = load_checkpoint(folder)
    set_parameters(model, cast_parameters(flatten_parameters(model), dtype or default_dtype()))
    mx.eval(flatten_parameters(model))
    return model, tokenizer, facts


def _load_whole(folder: Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return model, tokenizer and facts of a folder with all weights."""
    sizes, facts = _read_description(folder)
    try:
        arrays = load_file(folder / "model.safetensors")
        model = GPT(sizes)
    except Exception as error:  # the safetensors reader has several error types
        raise DataError(f"{folder}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    expected = {name: tuple(value.shape) for name, value in flatten_parameters(model).items()}
    found = {name: tuple(value.shape) for name, value in arrays.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise DataError(f"{folder}: weights do not match config.json: {', '.join(wrong[:5])}")
    set_parameters(model, {name: mx.array(value) for name, value in arrays.items()})
    return model, _load_tokenizer(folder, sizes), facts


def _read_description(folder: Path) -> tuple[GPTSizes, dict[str, Any]]:
    """Return the sizes of config.json, and the facts of checkpoint.json without those of adapters."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        sizes = GPTSizes(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            width=config["hidden_size"],
            context_tokens=config["max_position_embeddings"],
            rope_theta=config["rope_theta"],
            **{name: config[name] for name in _FEATURES if name in config},
        )
    except Exception as error:  # a foreign file may raise any error
        raise DataError(f"{folder}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    return sizes, {name: value for name, value in facts.items() if name != ADAPTER_KEY}


def _load_tokenizer(folder: Path, sizes: GPTSizes) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != sizes.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {sizes.vocab_size}")
    return tokenizer


def _features(sizes: GPTSizes) -> dict[str, Any]:
    """Return the fields that differ from October 2025; empty for models that mlx-lm supports."""
    fields = {field.name: field for field in dataclasses.fields(sizes)}
    return {name: getattr(sizes, name) for name in _FEATURES if getattr(sizes, name) != fields[name].default}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
