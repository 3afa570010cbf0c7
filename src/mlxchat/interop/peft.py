"""Imports and exports adapters in mlx-lm's and PEFT's formats.

PEFT stores A as (rank, in) and B as (out, rank); its scale is alpha / rank, or alpha / √rank for rank-stabilised LoRA
(arXiv 2312.03732). DoRA is the same as ours.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.config.schema import AdapterConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import ConfigError, DataError
from mlxchat.interop.names import hf_from_ours, ours_from_hf, sizes_from_hf
from mlxchat.interop.source import Check, ModelSource, read_json
from mlxchat.interop.tensors import read_safetensors, write_safetensors
from mlxchat.model.checkpoint import save_adapters
from mlxchat.model.lora import check_shapes, read_adapter_config
from mlxchat.model.sizes import GPTSizes
from mlxchat.store.catalog import ADAPTER_KEY

PEFT_FILE = "adapter_model.safetensors"
_CONFIG, _ADAPTERS = "adapter_config.json", "adapters.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_OURS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
_THEIRS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
# Initialisations that do not change the base's weights.
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


def sizes_from_peft(
    config: Mapping[str, Any], given: Iterable[str], where: str
) -> tuple[AdapterConfig, dict[str, str]]:
    """Return the sizes of PEFT's adapters, and our name of each of their tensors."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')!r} is not LORA")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "fan_in_fan_out"):
        if config.get(key):
            problems.append(f"{key} is {config[key]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: our models have none")
    if config.get("init_lora_weights") not in _BEGINNINGS:
        problems.append(f"init_lora_weights {config['init_lora_weights']!r} changes the base's weights")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout")
    if type(rank) is not int or rank < 1:
        problems.append(f"r {rank!r} is not an integer above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        problems.append(f"lora_alpha {alpha!r} is not a number")
    names, unknown = {}, []
    for name in given:
        found = _TENSOR.fullmatch(name)
        ours = None if found is None else ours_from_hf(f"{found[1]}.weight")
        if found is None or ours is None:
            unknown.append(name)
        else:
            names[name] = f"{ours.removesuffix('.weight')}.{_OURS[found[2]]}"
    if unknown:
        problems.append(f"{', '.join(unknown[:3])}: not adapters of a matrix of nanochat's model")
    if not names:
        problems.append("it has no adapters")
    if problems:
        raise DataError(f"{where}: {'; '.join(problems)}")
    assert type(rank) is int
    assert isinstance(alpha, int | float)
    targets = dict.fromkeys(name.rpartition(".")[0] for name in names.values())
    sizes = AdapterConfig(
        kind="dora" if config.get("use_dora") is True else "lora", rank=rank, targets=list(targets),
        scale=float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else rank),
        dropout=float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0,
    )  # fmt: skip
    return sizes, names


def check_peft(sizes: AdapterConfig, name: str) -> None:
    """Check that PEFT can represent adapters."""
    if sizes.bits is not None:
        raise ConfigError(
            f"{name} was trained on weights quantised by MLX to {sizes.bits} bits, which PEFT does not support. "
            "--to hf writes the merged weights"
        )


def write_peft(adapters: Mapping[str, np.ndarray[Any, Any]], sizes: AdapterConfig, out: Path, *, base: str) -> None:
    """Write adapters (float32, by our names) in PEFT's format, for a base exported with `--to hf`.

    `base` is its name, which PEFT uses as a path unless it is given the model.
    """
    theirs = {_peft_name(name): name for name in adapters}
    alpha = sizes.scale * sizes.rank
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": sizes.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": sizes.dropout,
        "target_modules": sorted(hf_from_ours(f"{name}.weight").removesuffix(".weight") for name in sizes.targets),
        "use_dora": sizes.kind == "dora", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    (out / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    arrays = {name: _as_peft(theirs[name], adapters[theirs[name]]) for name in sorted(theirs)}
    write_safetensors(out / PEFT_FILE, arrays, made_for="pt")


def _as_peft(name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert an adapter's array between our layout and PEFT's: A and B are transposed."""
    return values if name.endswith(".m") else np.ascontiguousarray(values.T)


def _peft_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"base_model.model.{hf_from_ours(f'{module}.weight').removesuffix('.weight')}.{_THEIRS[kind]}"


@dataclass(frozen=True)
class AdapterFiles:
    """The names of adapters' files in their source."""

    config: str = _CONFIG
    adapters: str = _ADAPTERS

    def identity(self) -> list[str]:
        """Return the names of the files that determine the adapters."""
        return [self.config, self.adapters]

    def all(self) -> list[str]:
        """Return the names of all files that are read."""
        return self.identity()


def find_files(source: ModelSource) -> AdapterFiles:
    """Return the files of adapters."""
    files = AdapterFiles(adapters=PEFT_FILE if source.has(PEFT_FILE) and not source.has(_ADAPTERS) else _ADAPTERS)
    if missing := " and no ".join(name for name in files.all() if not source.has(name)):
        what = f"{source.where} has no {missing}, so it has no adapters of mlx-lm or PEFT"
        raise DataError(f"{what}. It has {source.listed()}")
    source.small(files.config)
    return files


def import_adapter(
    source: ModelSource, files: AdapterFiles, base: Path | None, out: Path, *, chats: bool | None, check: Check
) -> GPTSizes:
    """Write adapters that were trained on the artifact `base` to `out` as a checkpoint; return the sizes of the model.

    `chats` is whether the result is a chat model; None: as its base.
    """
    if base is None:
        raise DataError("adapters need a base: mlxchat import adapter FOLDER --base REF")
    described = f"{base.name}: config.json"
    sizes = sizes_from_hf(read_json(base / "config.json", described), described)
    paths = source.fetch(files.all(), check)
    arrays = {name: tensor.floats() for name, tensor in read_safetensors(paths[files.adapters]).items()}
    if files.adapters == PEFT_FILE:
        config = read_json(paths[files.config], f"{source.where}: {files.config}")
        adapter_sizes, ours = sizes_from_peft(config, arrays, source.where)
        arrays = {ours[name]: _as_peft(ours[name], values) for name, values in arrays.items()}
    else:
        adapter_sizes = read_adapter_config(paths[files.config].parent, sizes)
    check_shapes({name: values.shape for name, values in arrays.items()}, adapter_sizes, sizes, source.where)
    if strange := sorted(name for name, value in arrays.items() if not np.isfinite(value).all()):
        raise DataError(f"{source.where}: {strange[0]} of the adapter has NaN or infinity")
    check()
    facts = read_json(base / "checkpoint.json", f"{base.name}: checkpoint.json")
    facts |= {"stage": "imported", "imported": {"format": "adapter"}}
    facts.pop(ADAPTER_KEY, None)
    if chats is not None:
        facts["format"] = "chat" if chats else "base"
    save_adapters(
        out, {name: mx.array(value) for name, value in arrays.items()}, adapter_sizes, base=base, sizes=sizes,
        tokenizer=Tokenizer.load(base), facts=facts,
    )  # fmt: skip
    return sizes
