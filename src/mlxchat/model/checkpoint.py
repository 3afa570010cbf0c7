"""Models as folders, which mlx-lm can open, in safe formats only; and as copies on every rank of a team.

Files: model.safetensors with nanochat's parameter names, config.json with `model_type: nanochat` (as in mlx-lm), the
tokenizer's files, and checkpoint.json with facts of the training. mlx-lm supports the architecture of October 2025;
folders of other models carry gpt.py, which mlx-lm uses with --trust-remote-code. A checkpoint of adapters has
adapters.safetensors and adapter_config.json instead of the weights, which are its base's.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.config.schema import AdapterConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.distributed.team import Team
from mlxchat.errors import DataError
from mlxchat.model.gpt import GPT, RMS_NORM_EPSILON
from mlxchat.model.lora import adapters_of, attach_adapters, merge_adapters, read_adapters, write_adapters
from mlxchat.model.parameters import cast_parameters, flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops.device import default_dtype
from mlxchat.store.catalog import ADAPTER_KEY, find_chain
from mlxchat.store.manifest import read_manifest

# Fields of config.json for features beyond October 2025.
_FEATURES = {field.name: field.default for field in fields(GPTSizes) if field.default is not MISSING}
# Whether there are value embeddings → logits of `computes_as_published`'s model of October 2025 or of July 2026.
_PUBLISHED = {
    False: [0.8079, 0.5504, -0.2206, 1.6032, 1.0472, -0.4978, 0.1645, -1.4432],
    True: [-0.9762, 0.1276, 1.756, -3.4417, 0.5237, -0.4309, -2.4445, -1.9487],
}
MODEL_FILE = "gpt.py"  # the model's own code, in folders whose model mlx-lm lacks


def save_checkpoint(folder: Path, model: GPT, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write a model into a folder, reproducibly and in float32; `facts` is plain data for checkpoint.json."""
    arrays = {name: np.asarray(value.astype(mx.float32)) for name, value in flatten_parameters(model).items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "mlx"})
    write_description(folder, model.sizes, tokenizer, facts)


def save_adapters(
    folder: Path, adapters: Mapping[str, mx.array], adapter_sizes: AdapterConfig, *, base: Path, sizes: GPTSizes,
    tokenizer: Tokenizer, facts: dict[str, Any],
) -> None:  # fmt: skip
    """Write a folder as `save_checkpoint` does, with adapters by name, which refers to its base artifact."""
    write_adapters(folder, adapters, adapter_sizes, num_layers=sizes.num_layers)
    about: dict[str, Any] = {"base": {"rid": read_manifest(base)["rid"]}}
    if adapter_sizes.bits is not None:
        about |= {"bits": adapter_sizes.bits, "group_size": adapter_sizes.group_size}
    write_description(folder, sizes, tokenizer, {**facts, ADAPTER_KEY: about})


def write_description(folder: Path, sizes: GPTSizes, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write a model folder's files except the weights, as `save_checkpoint` does."""
    config = config_of(sizes, tokenizer)
    if "model_file" in config:
        shutil.copyfile(Path(__file__).with_name(MODEL_FILE), folder / MODEL_FILE)
    _write_json(folder / "config.json", config)
    _write_json(folder / "checkpoint.json", facts)
    tokenizer.save(folder)


def config_of(sizes: GPTSizes, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of config.json, as mlx-lm expects them."""
    own = {"model_file": MODEL_FILE, "sizes": sizes.for_model_file()} if needs_model_file(sizes) else {}
    return {
        "model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width, "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads,
        "vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.context_tokens, "rope_theta": sizes.rope_theta,
        "rms_norm_eps": RMS_NORM_EPSILON, **_features(sizes), **own, "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.assistant_end, "tie_word_embeddings": False,
    }  # fmt: skip


def needs_model_file(sizes: GPTSizes) -> bool:
    """Return whether mlx-lm's own `nanochat` would compute something else than this model."""
    # Within the context, the architecture's name has no effect.
    return bool(_features(sizes).keys() - {"architecture"}) or not computes_as_published(sizes)


@cache
def computes_as_published(sizes: GPTSizes) -> bool:
    """Return whether gpt.py computes nanochat's architecture: a tiny model has the logits that nanochat's code has."""
    few: dict[str, Any] = {
        "num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 8, "vocab_multiple": 1,
    }  # fmt: skip
    small = replace(sizes, **few, rope_theta=1e4)
    rng = np.random.RandomState(0)  # the same numbers in every version of NumPy
    with mx.stream(mx.cpu):
        model = GPT(small)
        shapes = {name: value.shape for name, value in sorted(flatten_parameters(model).items())}
        drawn = {name: mx.array(rng.normal(0, 0.3, shape).astype(np.float32)) for name, shape in shapes.items()}
        set_parameters(model, drawn)
        logits = model(mx.array([[3, 1, 7]]))[0, -1]
        return bool(mx.allclose(logits, mx.array(_PUBLISHED[sizes.value_embeddings]), atol=1e-3))


def load_checkpoint(folder: Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return the model, its tokenizer and the facts of checkpoint.json.

    Adapters are fused into the weights of their base: a StoreError if it is not in the same store or has other weights
    than they were trained on. A DataError names a file that is missing, damaged or does not match the others.
    """
    *above, whole = find_chain(folder)
    model, tokenizer, facts = _load_whole(whole)
    for each in reversed(above):
        sizes, facts = _read_description(each)
        merge_adapters(model, *read_adapters(each, sizes))
    return model, tokenizer, facts


def load_for_inference(folder: Path, dtype: mx.Dtype | None = None) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return `load_checkpoint`'s result with weights in a dtype; None: the default device's."""
    model, tokenizer, facts = load_checkpoint(folder)
    set_parameters(model, cast_parameters(flatten_parameters(model), dtype or default_dtype()))
    mx.eval(flatten_parameters(model))
    return model, tokenizer, facts


def _load_whole(folder: Path) -> tuple[GPT, Tokenizer, dict[str, Any]]:
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
    return model, Tokenizer.load(folder), facts


def _read_description(folder: Path) -> tuple[GPTSizes, dict[str, Any]]:
    """Return the sizes of config.json, and the facts of checkpoint.json without those of adapters."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        sizes = GPTSizes(
            vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"],
            width=config["hidden_size"], context_tokens=config["max_position_embeddings"],
            rope_theta=config["rope_theta"], **{name: config[name] for name in _FEATURES if name in config},
        )  # fmt: skip
    except Exception as error:  # a foreign file may raise any error
        raise DataError(f"{folder}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    return sizes, {name: value for name, value in facts.items() if name != ADAPTER_KEY}


def _features(sizes: GPTSizes) -> dict[str, Any]:
    """Return the fields that differ from October 2025; empty for models that mlx-lm supports."""
    return {name: getattr(sizes, name) for name, usual in _FEATURES.items() if getattr(sizes, name) != usual}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# Ranks. Rank 0 calls `sync_model` before each call that needs the model. It sends everything the first time, later only
# parameters that are other arrays than last time, such as those that a training has updated.


def sync_model(team: Team | None, model: GPT, role: str = "model") -> None:
    """Send the current weights of a model from rank 0 to all, if there are several; a step's roles: model, teacher."""
    if team is None or team.size == 1:
        return
    parameters, adapters = flatten_parameters(model), adapters_of(model)
    shape = {"sizes": asdict(model.sizes), "names": list(parameters), "adapters": adapters and asdict(adapters)}
    known, equal = team.kept.get(f"{role} on all", (None, {}))
    changed = {name: value for name, value in parameters.items() if known != shape or equal.get(name) is not value}
    team.kept[f"{role} here"] = model
    if changed:
        team.call(_take, {"role": role, "shape": None if known == shape else shape}, changed)
    team.kept[f"{role} on all"] = (shape, parameters)


def model_on(team: Team, role: str = "model") -> GPT:
    """Return this rank's model; on rank 0 the last argument of `sync_model`."""
    return cast(GPT, team.kept[f"{role} here"])


def _take(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    if team.group.leads:
        return
    place, shape = f"{request['role']} here", request["shape"]
    if shape is not None:
        team.kept.pop(place, None)
        model = team.kept[place] = GPT(GPTSizes(**shape["sizes"]))
        if shape["adapters"]:
            attach_adapters(model, AdapterConfig(**shape["adapters"]))
    set_parameters(team.kept[place], arrays)
