"""Exports checkpoints for transformers, nanochat, mlx-lm and PEFT; `gguf` for llama.cpp.

Tensors are renamed (`names`) and rounded only on request. A tensor that was imported as bfloat16, or nanochat's
embedding if bfloat16 represents it exactly, is written as bfloat16, so a round trip is bit-exact.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import CONFIG_FILE, HF_FILE
from mlxchat.errors import ConfigError
from mlxchat.interop.gguf import TYPES, check_gguf
from mlxchat.interop.names import (
    COMPILED_PREFIX,
    HF_ARCHITECTURE,
    SOFT_CAP,
    check_hf,
    hf_from_ours,
    nanochat_from_sizes,
    nanochat_snapshot,
)
from mlxchat.interop.peft import check_peft, write_peft
from mlxchat.interop.source import read_json
from mlxchat.interop.tensors import FLOATS, Array, Floats, as_stored, fits, write_safetensors
from mlxchat.interop.torch_files import write_encoding, write_state, write_tensor
from mlxchat.model import gpt
from mlxchat.model.checkpoint import MODEL_FILE, computes_as_published, config_of, load_checkpoint
from mlxchat.model.gpt import GPT, RMS_NORM_EPSILON
from mlxchat.model.lora import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, read_adapters
from mlxchat.model.parameters import flatten_parameters
from mlxchat.model.sizes import GPTSizes
from mlxchat.store.catalog import find_chain
from mlxchat.store.manifest import MANIFEST, read_manifest

CODES = {dtype.name: code for code, dtype in FLOATS.items()}
_GROUP_NUMBERS = (64, 32)
_TABLES = ("transformer.wte.", "value_embeds.")
# The default of nanochat's scripts; only meta files of base models have it.
_NANOCHAT_BATCH_ROWS = 32


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint artifact to export."""

    folder: Path
    model: GPT
    """With adapters fused into its weights."""
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    """Of checkpoint.json."""
    iterations: int
    """Updates of its last training."""
    bases: tuple[Path, ...]
    """The base models of a checkpoint with adapters, nearest first."""

    @property
    def sizes(self) -> GPTSizes:
        """Sizes of the model."""
        return self.model.sizes

    @cached_property
    def weights(self) -> dict[str, Floats]:
        """Weights of the model by name."""
        return {name: np.asarray(value) for name, value in sorted(flatten_parameters(self.model).items())}

    @property
    def chats(self) -> bool:
        """Whether it is a chat model."""
        return self.facts.get("format") == "chat"

    @property
    def stop_token(self) -> str:
        """The token that ends an answer; for a base model <|bos|>, which begins the next document."""
        return "<|assistant_end|>" if self.chats else "<|bos|>"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint artifact; DataError or StoreError if a file, the manifest or a base is missing or damaged."""
    model, tokenizer, _ = load_checkpoint(folder)
    facts = read_json(folder / "checkpoint.json", f"{folder.name}: checkpoint.json")
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    iterations = facts.get("iterations", (manifest.get("derived") or {}).get("num_iterations"))
    return Checkpoint(
        folder, model, tokenizer, facts, iterations if isinstance(iterations, int) else 0,
        tuple(find_chain(folder)[1:]),
    )  # fmt: skip


def check_export(checkpoint: Checkpoint, target: str, *, bits: int | None, dtype: str | None) -> None:
    """Raise a ConfigError, which names the alternatives, if a format cannot represent the checkpoint."""
    adapters_alone = target in ("mlx-adapter", "peft")
    if adapters_alone and not checkpoint.bases:
        instead = "mlx" if target == "mlx-adapter" else "hf"
        raise ConfigError(f"{checkpoint.folder.name} has no adapters. --to {instead} writes its weights")
    if adapters_alone and (bits is not None or dtype is not None):
        raise ConfigError("adapters are written in float32; --bits and --dtype require --to mlx")
    if bits is not None and target != "mlx":
        raise ConfigError(f"--bits requires --to mlx, not {target}")
    types = {"gguf": TYPES, "hf": ("float32", "bfloat16"), "mlx": ("float32", "bfloat16")}.get(target, ())
    if dtype is not None and dtype not in types:
        expected = f"expected {', '.join(types)} with --to {target}" if types else f"--to {target} has fixed types"
        raise ConfigError(f"--dtype is {dtype}; {expected}")
    if bits is not None and checkpoint.sizes.width % _GROUP_NUMBERS[-1]:
        raise ConfigError(f"--bits needs a width that is a multiple of 32, got {checkpoint.sizes.width}")
    if target in ("hf", "peft"):
        check_hf(checkpoint.sizes)
    if target == "peft":
        check_peft(read_adapters(checkpoint.folder, checkpoint.sizes)[0], checkpoint.folder.name)
    if target == "nanochat":
        nanochat_snapshot(checkpoint.sizes)
    if target == "gguf":
        check_gguf(checkpoint.sizes)


def check_computation(checkpoint: Checkpoint) -> None:
    """Raise a ConfigError if gpt.py was changed so that other tools compute another model with the same weights."""
    if not computes_as_published(checkpoint.sizes):
        raise ConfigError(
            f"{checkpoint.folder.name} computes other logits than nanochat's architecture with the same weights, since "
            "mlxchat/model/gpt.py was changed. Other tools would run another model, so it cannot be exported in this "
            "format. Use --to mlx, whose folder carries gpt.py"
        )


def write_hf(checkpoint: Checkpoint, out: Path, *, dtype: str | None = None) -> None:
    """Write a folder of `NanoChatForCausalLM`.

    `dtype` is float32 or bfloat16; None: as imported, or float32.
    """
    sizes = checkpoint.sizes
    arrays = {
        hf_from_ours(name): as_stored(values, CODES[dtype] if dtype else _kept_dtype(checkpoint, name, "hf"))
        for name, values in checkpoint.weights.items()
    }
    write_safetensors(out / "model.safetensors", dict(sorted(arrays.items())), made_for="pt")
    types = {array.dtype for array in arrays.values()}
    stop = checkpoint.tokenizer.special_ids[checkpoint.stop_token]
    common = {"bos_token_id": checkpoint.tokenizer.bos, "eos_token_id": stop}
    config = {
        "architectures": [HF_ARCHITECTURE], "model_type": "nanochat", "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads,
        "max_position_embeddings": sizes.context_tokens, "hidden_act": "relu2", "rms_norm_eps": RMS_NORM_EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "final_logit_softcapping": SOFT_CAP, "attention_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, **common,
        "pad_token_id": None,  # else transformers would not train this row of the embedding
        "dtype": next((each.name for each in FLOATS.values() if types == {np.dtype(each.numpy)}), "float32"),
    }  # fmt: skip
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {**common, "pad_token_id": stop})
    _write_tokenizer(checkpoint, out)


def write_nanochat(checkpoint: Checkpoint, out: Path) -> str:
    """Write a checkpoint for nanochat; return the snapshot of nanochat that loads it.

    Files: model_NNNNNN.pt, meta_NNNNNN.json, tokenizer/tokenizer.pkl, tokenizer/token_bytes.pt.
    """
    snapshot = nanochat_snapshot(checkpoint.sizes)
    step = checkpoint.iterations
    prefix = COMPILED_PREFIX if _as_imported(checkpoint, "nanochat").get("compiled") else ""
    arrays = {
        prefix + name: as_stored(values, _kept_dtype(checkpoint, name, "nanochat"))
        for name, values in checkpoint.weights.items()
    }
    write_state(out / f"model_{step:06d}.pt", arrays)
    numbers = _as_imported(checkpoint, "nanochat").get("meta") or {}
    base = {} if checkpoint.chats else {"device_batch_size": _NANOCHAT_BATCH_ROWS}
    base |= {} if checkpoint.chats else {"max_seq_len": checkpoint.sizes.context_tokens}
    meta = {"step": step, **base, **numbers}
    meta["model_config"] = nanochat_from_sizes(replace(checkpoint.sizes, architecture=snapshot))
    _write_json(out / f"meta_{step:06d}.json", meta)
    tokenizer, place = checkpoint.tokenizer, out / "tokenizer"
    place.mkdir()
    write_encoding(place / "tokenizer.pkl", tokenizer.pattern, tokenizer.ranks, tokenizer.special_ids)
    write_tensor(place / "token_bytes.pt", tokenizer.token_bytes)
    return snapshot


def write_mlx(checkpoint: Checkpoint, out: Path, *, bits: int | None = None, dtype: str | None = None) -> None:
    """Write a folder for mlx-lm, with a model file for architectures that mlx-lm lacks.

    `bits` (8 or 4) quantises the matrices; `dtype` is of all other numbers, including scales; None: float32.
    """
    code = CODES[dtype or "float32"]
    config = config_of(checkpoint.sizes, checkpoint.tokenizer)
    config["eos_token_id"] = checkpoint.tokenizer.special_ids[checkpoint.stop_token]
    if "model_file" in config:
        shutil.copyfile(gpt.__file__, out / MODEL_FILE)
    arrays: dict[str, Array] = {}
    groups: dict[str, int] = {}
    for name, values in checkpoint.weights.items():
        group = _group_of(name, values.shape)
        if bits is None or group is None:
            arrays[name] = as_stored(values, code)
            continue
        module = name.removesuffix(".weight")
        groups[module] = group
        arrays[name], arrays[f"{module}.scales"], arrays[f"{module}.biases"] = _quantised(values, group, bits, code)
    write_safetensors(out / "model.safetensors", arrays, made_for="mlx")
    if bits is not None:
        largest = max(groups.values())
        usual = {"group_size": largest, "bits": bits, "mode": "affine"}
        narrow = {name: {**usual, "group_size": group} for name, group in groups.items() if group < largest}
        quantization = {**usual, **narrow}
        config |= {"quantization": quantization, "quantization_config": quantization}
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write_tokenizer(checkpoint, out)


def write_adapters(checkpoint: Checkpoint, out: Path, target: str) -> None:
    """Write only the adapters, in the format of `target`: mlx-adapter or peft."""
    if target == "peft":
        sizes, arrays = read_adapters(checkpoint.folder, checkpoint.sizes)
        write_peft(arrays, sizes, out, base=checkpoint.bases[0].name)
        return
    for name in (ADAPTERS_FILE, ADAPTER_CONFIG_FILE):
        shutil.copyfile(checkpoint.folder / name, out / name)


def _quantised(values: Floats, group: int, bits: int, code: str) -> tuple[Array, Array, Array]:
    """Return packed numbers, scales and biases of a matrix; the latter two are stored as `code`."""
    matrix = mx.array(values).astype(mx.bfloat16 if code == "BF16" else mx.float32)
    packed, *others = mx.quantize(matrix, group_size=group, bits=bits)
    scales, biases = (np.asarray(part.view(mx.uint16) if code == "BF16" else part) for part in others)
    return np.asarray(packed), scales, biases


def _group_of(name: str, shape: tuple[int, ...]) -> int | None:
    """Return the group size of a quantised matrix; None: not quantised, since its rows have no whole groups."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return None
    return next((group for group in _GROUP_NUMBERS if shape[1] % group == 0), None)


def _as_imported(checkpoint: Checkpoint, target: str) -> dict[str, Any]:
    """Return the stored facts of an unchanged imported model if it is exported to its original format; else {}."""
    if checkpoint.facts.get("stage") != "imported":
        return {}
    imported = checkpoint.facts.get("imported")
    return imported if isinstance(imported, dict) and imported.get("format") == target else {}


def _kept_dtype(checkpoint: Checkpoint, name: str, target: str) -> str:
    """Return the type in which a tensor is written without loss."""
    imported = _as_imported(checkpoint, target)
    if "dtypes" in imported:
        wanted = CODES[imported["dtypes"].get(name, "float32")]
    else:
        wanted = "BF16" if target == "nanochat" and name.startswith(_TABLES) else "F32"
    return wanted if fits(checkpoint.weights[name], wanted) else "F32"


def _write_tokenizer(checkpoint: Checkpoint, out: Path) -> None:
    """Write the tokenizer for transformers; a base model's has no chat template and stops at <|bos|>."""
    shutil.copyfile(checkpoint.folder / HF_FILE, out / HF_FILE)
    config = json.loads((checkpoint.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not checkpoint.chats:
        config.pop("chat_template", None)
    config |= {"eos_token": checkpoint.stop_token, "pad_token": checkpoint.stop_token}
    # Left, since generation continues each row of a batch at its end.
    config |= {"model_max_length": checkpoint.sizes.context_tokens, "padding_side": "left"}
    _write_json(out / CONFIG_FILE, config)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
