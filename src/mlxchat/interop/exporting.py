"""A checkpoint of ours as a folder of another tool: transformers, nanochat, mlx-lm, PEFT.

No numbers move but where they are rounded on request: tensors are renamed (`names`), and a tensor that came in as
bfloat16, or an embedding all of whose numbers bfloat16 has, goes out as bfloat16, so a round trip changes no bit.
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
    beyond_october,
    check_hf,
    hf_from_ours,
    nanochat_from_sizes,
    nanochat_snapshot,
    sizes_from_hf,
)
from mlxchat.interop.peft import check_peft, write_peft
from mlxchat.interop.tensors import FLOATS, AdaptedWeights, Array, Entry, StoredWeights, as_stored, write_safetensors
from mlxchat.interop.torch_files import write_encoding, write_state, write_tensor
from mlxchat.model.sizes import GPTSizes
from mlxchat.store.bases import find_chain
from mlxchat.store.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from mlxchat.model.lora import Adapters

CODES = {dtype.name: code for code, dtype in FLOATS.items()}
BITS = (8, 4)
_GROUP_NUMBERS = (64, 32)
_TABLES = ("transformer.wte.", "value_embeds.")
# The default of nanochat's scripts; only base models have it in their meta file.
_NANOCHAT_BATCH_ROWS = 32


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint artifact that is to be exported, with its adapters, if it has any, in its weights."""

    folder: Path
    sizes: GPTSizes
    tokenizer: Tokenizer
    facts: Mapping[str, Any]
    """Of checkpoint.json."""
    weights: StoredWeights
    iterations: int
    """Updates of its last training."""
    bases: tuple[Path, ...] = ()
    """What its weights rest on if it holds adapters, the nearest first."""

    @property
    def chats(self) -> bool:
        """Whether it has learnt to chat."""
        return self.facts.get("format") == "chat"

    @property
    def stop_token(self) -> str:
        """What ends its answer; a base model's text ends where the next document begins."""
        return "<|assistant_end|>" if self.chats else "<|bos|>"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint artifact's parts; of the weights nothing is read yet.

    Raises:
        DataError: a file is missing or damaged.
        StoreError: its manifest is; or it holds adapters, and their base is missing.
    """
    chain = find_chain(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
        below = {base.name: json.loads((base / "config.json").read_text(encoding="utf-8")) for base in chain[1:]}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: no readable checkpoint ({error})") from None
    sizes = sizes_from_hf(config, f"{folder.name}: config.json")
    iterations = facts.get("iterations", (manifest.get("derived") or {}).get("num_iterations"))
    iterations = iterations if isinstance(iterations, int) and iterations >= 0 else 0
    for name, config in below.items():
        if sizes_from_hf(config, f"{name}: config.json") != sizes:
            raise DataError(f"{folder}: config.json is of another model than its base, {name}")
    weights = StoredWeights(folder) if len(chain) == 1 else AdaptedWeights(chain, sizes)
    return Checkpoint(folder, sizes, Tokenizer.load(folder), facts, weights, iterations, tuple(chain[1:]))


def check_export(checkpoint: Checkpoint, target: str, *, bits: int | None, dtype: str | None) -> None:
    """Refuse what a format cannot hold, before anything is written.

    Raises:
        ConfigError: with the reason, and what works instead.
    """
    adapters_alone = target in ("mlx-adapter", "peft")
    if adapters_alone and not checkpoint.bases:
        instead = "mlx" if target == "mlx-adapter" else "hf"
        raise ConfigError(
            f"{checkpoint.folder.name} holds no adapters: all of its weights are its own. --to {instead} writes them"
        )
    if adapters_alone and (bits is not None or dtype is not None):
        raise ConfigError("adapters are written as they were trained, in float32: --quantize, --dtype are of --to mlx")
    if bits is not None and target != "mlx":
        raise ConfigError(f"--quantize is of --to mlx; {target} holds a model's weights as they are")
    if dtype is not None and target == "nanochat":
        raise ConfigError(
            "--dtype is of --to hf and --to mlx; nanochat's files have the types that nanochat gives them"
        )
    if bits is not None and checkpoint.sizes.width % _GROUP_NUMBERS[-1]:
        raise ConfigError(f"a width of {checkpoint.sizes.width} has no groups of 32 numbers, which --quantize needs")
    if target in ("hf", "peft"):
        check_hf(checkpoint.sizes)
    if target == "peft":
        check_peft(_read_adapters(checkpoint).sizes, checkpoint.folder.name)
    if target == "nanochat":
        nanochat_snapshot(checkpoint.sizes)


def write_hf(checkpoint: Checkpoint, out: Path, *, dtype: str | None = None) -> None:
    """Write a folder of `NanoChatForCausalLM`.

    Args:
        checkpoint: `check_export` has let it pass.
        out: an empty folder.
        dtype: float32 or bfloat16; None: as it came in, or float32.
    """
    from mlxchat.ops.attention import RMS_NORM_EPSILON

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
        "pad_token_id": None,  # transformers would not train this row of the embedding
        "dtype": next((name for name, kind in CODES.items() if set(kinds.values()) == {kind}), "float32"),
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {**common, "pad_token_id": stop})
    _write_tokenizer(checkpoint, out)


def write_nanochat(checkpoint: Checkpoint, out: Path) -> str:
    """Write a checkpoint as nanochat's code loads it; return which snapshot's code.

    model_NNNNNN.pt, meta_NNNNNN.json, tokenizer/tokenizer.pkl, tokenizer/token_bytes.pt.

    Args:
        checkpoint: `check_export` has let it pass.
        out: an empty folder.
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
    """Write a folder that mlx-lm opens, with a model file of its own for architectures that mlx-lm lacks.

    Args:
        checkpoint: `check_export` has let it pass.
        out: an empty folder.
        bits: of the quantised matrices, 8 or 4; None: no matrix is.
        dtype: of all other numbers, scales included; None: float32.
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


def write_mlx_adapter(checkpoint: Checkpoint, out: Path) -> None:
    """Write the adapters alone, as mlx-lm takes them beside their base.

    Args:
        checkpoint: `check_export` has let it pass.
        out: an empty folder.
    """
    from mlxchat.model.lora import ADAPTER_CONFIG_FILE, ADAPTERS_FILE

    for name in (ADAPTERS_FILE, ADAPTER_CONFIG_FILE):
        shutil.copyfile(checkpoint.folder / name, out / name)


def write_peft_adapter(checkpoint: Checkpoint, out: Path) -> None:
    """Write the adapters alone, as PEFT takes them on a base of transformers'.

    Args:
        checkpoint: `check_export` has let it pass.
        out: an empty folder.
    """
    adapters = _read_adapters(checkpoint)
    write_peft(adapters.arrays, adapters.sizes, out, base=checkpoint.bases[0].name)


def _read_adapters(checkpoint: Checkpoint) -> Adapters:
    from mlxchat.model.lora import read_adapters

    return read_adapters(checkpoint.folder, checkpoint.sizes)


def needs_model_file(checkpoint: Checkpoint) -> bool:
    """Return whether mlx-lm has to run a model file of the folder."""
    return bool(beyond_october(checkpoint.sizes))


def rounded(values: np.ndarray[Any, np.dtype[np.float32]], name: str, bits: int, dtype: str | None) -> Any:
    """Return a tensor as an MLX array with the numbers that a quantised export computes with."""
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
    """Return how many numbers of a row share a scale; None: not quantised, as rows without whole groups."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return None
    return next((group for group in _GROUP_NUMBERS if shape[1] % group == 0), None)


def _as_imported(checkpoint: Checkpoint, target: str) -> dict[str, Any]:
    """Return how an imported model was stored, if it is unchanged and is exported to the same format."""
    if checkpoint.facts.get("stage") != "imported":
        return {}
    imported = checkpoint.facts.get("imported")
    return imported if isinstance(imported, dict) and imported.get("format") == target else {}


def _kept_dtype(checkpoint: Checkpoint, name: str, target: str) -> str:
    """Return in which type a tensor is written so that no bit of it is lost."""
    imported = _as_imported(checkpoint, target)
    if "dtypes" in imported:
        wanted = CODES[imported["dtypes"].get(name, "float32")]
    else:
        wanted = "BF16" if target == "nanochat" and name.startswith(_TABLES) else "F32"
    return wanted if checkpoint.weights.fits(name, wanted) else "F32"


def _write_tokenizer(checkpoint: Checkpoint, out: Path) -> None:
    """Write the tokenizer for transformers; a base model's has no chat template, and stops where a document does."""
    shutil.copyfile(checkpoint.folder / HF_FILE, out / HF_FILE)
    config = json.loads((checkpoint.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not checkpoint.chats:
        config.pop("chat_template", None)
    config |= {"eos_token": checkpoint.stop_token, "pad_token": checkpoint.stop_token}
    # Left: a model continues each row of a batch at its end.
    config |= {"model_max_length": checkpoint.sizes.context_tokens, "padding_side": "left"}
    _write_json(out / CONFIG_FILE, config)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
