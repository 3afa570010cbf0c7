"""Exports checkpoints for transformers, nanochat, mlx-lm and PEFT.

Tensors are renamed (`names`) and rounded only on request. A tensor that was imported as bfloat16, or nanochat's
embedding if bfloat16 represents it exactly, is written as bfloat16, so a round trip is bit-exact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import CONFIG_FILE, HF_FILE
from mlxchat.errors import ConfigError, DataError
from mlxchat.interop.names import (
    COMPILED_PREFIX,
    HF_ARCHITECTURE,
    SOFT_CAP,
    check_hf,
    hf_from_ours,
    nanochat_from_sizes,
    nanochat_snapshot,
    sizes_from_hf,
)
from mlxchat.interop.peft import check_peft, write_peft
from mlxchat.interop.tensors import FLOATS, AdaptedWeights, Array, Entry, StoredWeights, as_stored, write_safetensors
from mlxchat.interop.torch_files import write_encoding, write_state, write_tensor
from mlxchat.model.published import published_logits
from mlxchat.model.sizes import GPTSizes
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from mlxchat.model.lora import Adapters

CODES = {dtype.name: code for code, dtype in FLOATS.items()}
_GROUP_NUMBERS = (64, 32)
_TABLES = ("transformer.wte.", "value_embeds.")
_COMPARED_TOKENS = 8
# Of logits within ±15, in float32: rounding stays far below, a changed activation far above.
_MOST_DIFFERENCE = 0.01
# The default of nanochat's scripts; only meta files of base models have it.
_NANOCHAT_BATCH_ROWS = 32


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint artifact to export; adapters are fused into its weights."""

    folder: Path
    sizes: GPTSizes
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    """Of checkpoint.json."""
    weights: StoredWeights
    iterations: int
    """Updates of its last training."""
    bases: tuple[Path, ...] = ()
    """The base models of a checkpoint with adapters, nearest first."""

    @property
    def chats(self) -> bool:
        """Whether it is a chat model."""
        return self.facts.get("format") == "chat"

    @property
    def stop_token(self) -> str:
        """The token that ends an answer; for a base model <|bos|>, which begins the next document."""
        return "<|assistant_end|>" if self.chats else "<|bos|>"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint artifact; the weights are read later.

    Raises:
        DataError: a file is missing or damaged.
        StoreError: the manifest is damaged, or the base of its adapters is missing.
    """
    chain = find_chain(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
        below = {base.name: json.loads((base / "config.json").read_text(encoding="utf-8")) for base in chain[1:]}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: not a readable checkpoint ({error})") from None
    sizes = sizes_from_hf(config, f"{folder.name}: config.json")
    iterations = facts.get("iterations", (manifest.get("derived") or {}).get("num_iterations"))
    iterations = iterations if isinstance(iterations, int) and iterations >= 0 else 0
    for name, config in below.items():
        if sizes_from_hf(config, f"{name}: config.json") != sizes:
            raise DataError(f"{folder}: config.json differs from that of its base, {name}")
    weights = StoredWeights(folder) if len(chain) == 1 else AdaptedWeights(chain, sizes)
    return Checkpoint(folder, sizes, Tokenizer.load(folder), facts, weights, iterations, tuple(chain[1:]))


def check_export(checkpoint: Checkpoint, target: str, *, bits: int | None, dtype: str | None) -> None:
    """Check that a format can represent the checkpoint, before anything is written.

    Raises:
        ConfigError: it cannot; names the alternatives.
    """
    adapters_alone = target in ("mlx-adapter", "peft")
    if adapters_alone and not checkpoint.bases:
        instead = "mlx" if target == "mlx-adapter" else "hf"
        raise ConfigError(f"{checkpoint.folder.name} has no adapters. --to {instead} writes its weights")
    if adapters_alone and (bits is not None or dtype is not None):
        raise ConfigError("adapters are written in float32; --bits and --dtype require --to mlx")
    if bits is not None and target != "mlx":
        raise ConfigError(f"--bits requires --to mlx, not {target}")
    if dtype is not None and target == "nanochat":
        raise ConfigError("--dtype requires --to hf or --to mlx; nanochat's files have fixed types")
    if bits is not None and checkpoint.sizes.width % _GROUP_NUMBERS[-1]:
        raise ConfigError(f"--bits needs a width that is a multiple of 32, got {checkpoint.sizes.width}")
    if target in ("hf", "peft"):
        check_hf(checkpoint.sizes)
    if target == "peft":
        check_peft(_read_adapters(checkpoint).sizes, checkpoint.folder.name)
    if target == "nanochat":
        nanochat_snapshot(checkpoint.sizes)


def check_computation(checkpoint: Checkpoint) -> None:
    """Check on a few tokens that the model computes what other tools compute with its weights.

    Raises:
        ConfigError: mlxchat/model/gpt.py was changed, so an export would be another model.
    """
    import mlx.core as mx

    from mlxchat.model.checkpoint import load_checkpoint

    sizes = checkpoint.sizes
    ids = np.arange(1, _COMPARED_TOKENS + 1)[None] * 7919 % sizes.vocab_size
    with mx.stream(mx.cpu):
        model, _, _ = load_checkpoint(checkpoint.folder)
        ours = np.asarray(model(mx.array(ids)))
    difference = float(np.abs(ours - published_logits(checkpoint.weights, sizes, ids)).max())
    if not difference <= _MOST_DIFFERENCE:
        raise ConfigError(
            f"{checkpoint.folder.name} computes other logits than nanochat's architecture with the same weights (by up "
            f"to {difference:.3g}), since mlxchat/model/gpt.py was changed. Other tools would run another model, so it "
            "cannot be exported in this format. Use --to mlx, whose folder carries gpt.py"
        )


def write_hf(checkpoint: Checkpoint, out: Path, *, dtype: str | None = None) -> None:
    """Write a folder of `NanoChatForCausalLM`.

    Args:
        checkpoint: checked by `check_export`.
        out: an empty folder.
        dtype: float32 or bfloat16; None: as imported, or float32.
    """
    from mlxchat.model.gpt import RMS_NORM_EPSILON

    sizes, weights = checkpoint.sizes, checkpoint.weights
    kinds = {name: CODES[dtype] if dtype else _kept_dtype(checkpoint, name, "hf") for name in weights.shapes}
    ours = {hf_from_ours(name): name for name in weights.shapes}
    entries = [Entry(name, kinds[ours[name]], weights.shapes[ours[name]]) for name in sorted(ours)]
    write_safetensors(
        out / "model.safetensors", entries, lambda name: _pieces(checkpoint, ours[name], kinds[ours[name]]),
        made_for="pt",
    )  # fmt: skip
    stop = checkpoint.tokenizer.special_ids[checkpoint.stop_token]
    common = {"bos_token_id": checkpoint.tokenizer.bos, "eos_token_id": stop}
    config = {
        "architectures": [HF_ARCHITECTURE],
        "model_type": "nanochat",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "max_position_embeddings": sizes.context_tokens,
        "hidden_act": "relu2",
        "rms_norm_eps": RMS_NORM_EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
        "final_logit_softcapping": SOFT_CAP,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        **common,
        "pad_token_id": None,  # else transformers would not train this row of the embedding
        "dtype": next((name for name, kind in CODES.items() if set(kinds.values()) == {kind}), "float32"),
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {**common, "pad_token_id": stop})
    _write_tokenizer(checkpoint, out)


def write_nanochat(checkpoint: Checkpoint, out: Path) -> str:
    """Write a checkpoint for nanochat; return the snapshot of nanochat that loads it.

    Files: model_NNNNNN.pt, meta_NNNNNN.json, tokenizer/tokenizer.pkl, tokenizer/token_bytes.pt.
    """
    snapshot = nanochat_snapshot(checkpoint.sizes)
    weights, step = checkpoint.weights, checkpoint.iterations
    kinds = {name: _kept_dtype(checkpoint, name, "nanochat") for name in weights.shapes}
    prefix = COMPILED_PREFIX if _as_imported(checkpoint, "nanochat").get("compiled") else ""
    entries = [Entry(prefix + name, kinds[name], weights.shapes[name]) for name in weights.shapes]

    def read(name: str) -> Iterator[Array]:
        ours = name.removeprefix(prefix)
        return _pieces(checkpoint, ours, kinds[ours])

    write_state(out / f"model_{step:06d}.pt", entries, read)
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

    Args:
        checkpoint: checked by `check_export`.
        out: an empty folder.
        bits: of quantised matrices, 8 or 4; None: not quantised.
        dtype: of all other numbers, including scales; None: float32.
    """
    from mlxchat.model.checkpoint import config_of, write_model_file

    weights, kind = checkpoint.weights, CODES[dtype or "float32"]
    config = config_of(checkpoint.sizes, checkpoint.tokenizer)
    config["eos_token_id"] = checkpoint.tokenizer.special_ids[checkpoint.stop_token]
    if "model_file" in config:
        write_model_file(out)
    groups = {name: _groups_of(name, shape) if bits else None for name, shape in weights.shapes.items()}
    entries: list[Entry] = []
    for name, (*rows, columns) in sorted(weights.shapes.items()):
        if bits is None or (group := groups[name]) is None:
            entries.append(Entry(name, kind, (*rows, columns)))
            continue
        stem = name.removesuffix(".weight")
        entries.append(Entry(name, "U32", (*rows, columns * bits // 32)))
        entries += [Entry(f"{stem}.{part}", kind, (*rows, columns // group)) for part in ("scales", "biases")]
    parts: dict[str, Array] = {}

    def read(name: str) -> Iterator[Array]:
        if name in parts:
            yield parts.pop(name)
        elif bits is None or (group := groups[name]) is None:
            yield from _pieces(checkpoint, name, kind)
        else:
            stem = name.removesuffix(".weight")
            packed, parts[f"{stem}.scales"], parts[f"{stem}.biases"] = _quantised(weights(name), group, bits, kind)
            yield packed

    write_safetensors(out / "model.safetensors", entries, read, made_for="mlx")
    if bits is not None:
        used = {name.removesuffix(".weight"): group for name, group in groups.items() if group is not None}
        usual = {"group_size": max(used.values()), "bits": bits, "mode": "affine"}
        narrow = {name: {**usual, "group_size": group} for name, group in used.items() if group < max(used.values())}
        quantization = {**usual, **narrow}
        config |= {"quantization": quantization, "quantization_config": quantization}
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write_tokenizer(checkpoint, out)


def write_adapters(checkpoint: Checkpoint, out: Path, target: str) -> None:
    """Write only the adapters, in the format of `target`: mlx-adapter or peft."""
    from mlxchat.model.lora import ADAPTER_CONFIG_FILE, ADAPTERS_FILE

    if target == "peft":
        adapters = _read_adapters(checkpoint)
        write_peft(adapters.arrays, adapters.sizes, out, base=checkpoint.bases[0].name)
        return
    for name in (ADAPTERS_FILE, ADAPTER_CONFIG_FILE):
        shutil.copyfile(checkpoint.folder / name, out / name)


def _read_adapters(checkpoint: Checkpoint) -> Adapters:
    from mlxchat.model.lora import read_adapters

    return read_adapters(checkpoint.folder, checkpoint.sizes)


def needs_model_file(checkpoint: Checkpoint) -> bool:
    """Return True if mlx-lm needs the folder's model file."""
    from mlxchat.model import checkpoint as checkpoints

    return checkpoints.needs_model_file(checkpoint.sizes)


def rounded(values: np.ndarray[Any, np.dtype[np.float32]], name: str, bits: int, dtype: str | None) -> Any:
    """Return a tensor as an MLX array with the values of a quantised export."""
    import mlx.core as mx

    array, group = mx.array(values), _groups_of(name, values.shape)
    if dtype == "bfloat16":
        array = array.astype(mx.bfloat16)
    if group is not None:
        array = mx.dequantize(*mx.quantize(array, group_size=group, bits=bits), group_size=group, bits=bits)
    return array.astype(mx.float32)


def _quantised(
    values: np.ndarray[Any, np.dtype[np.float32]], group: int, bits: int, kind: str
) -> tuple[Array, Array, Array]:
    import mlx.core as mx

    matrix = mx.array(values)
    if kind == "BF16":
        matrix = matrix.astype(mx.bfloat16)
    packed, *others = mx.quantize(matrix, group_size=group, bits=bits)
    scales, biases = (np.asarray(part.view(mx.uint16) if kind == "BF16" else part) for part in others)
    return np.asarray(packed), scales, biases


def _pieces(checkpoint: Checkpoint, name: str, kind: str) -> Iterator[Array]:
    for piece in checkpoint.weights.pieces(name):
        yield as_stored(piece, kind)


def _groups_of(name: str, shape: tuple[int, ...]) -> int | None:
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
    return wanted if checkpoint.weights.fits(name, wanted) else "F32"


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
