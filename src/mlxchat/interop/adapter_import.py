"""Adapters that mlx-lm or PEFT trained on a model of ours become an artifact: the same numbers, on the base named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxchat.errors import DataError
from mlxchat.interop.names import sizes_from_hf
from mlxchat.interop.peft import PEFT_FILE, as_peft, peft_shape, sizes_from_peft
from mlxchat.interop.source import Check, ModelSource
from mlxchat.interop.tensors import SafetensorsFile, widen
from mlxchat.model.sizes import GPTSizes

_CONFIG, _ADAPTERS = "adapter_config.json", "adapters.safetensors"
_MOST_SHOWN = 8


@dataclass(frozen=True)
class AdapterFiles:
    """The names of adapters' files in their source."""

    config: str = _CONFIG
    adapters: str = _ADAPTERS

    def identity(self) -> list[str]:
        """Return the names of those that the adapters are made of."""
        return [self.config, self.adapters]

    def all(self) -> list[str]:
        """Return the names of those that are read."""
        return self.identity()


def find_files(source: ModelSource) -> AdapterFiles:
    """Return the files of adapters.

    Raises:
        DataError: one is missing.
    """
    files = AdapterFiles(adapters=PEFT_FILE if source.has(PEFT_FILE) and not source.has(_ADAPTERS) else _ADAPTERS)
    missing = [name for name in files.all() if not source.has(name)]
    if missing:
        names, wanted = ", ".join(sorted(source.files)[:_MOST_SHOWN]) or "nothing", " and no ".join(missing)
        raise DataError(
            f"{source.where} holds no {wanted}, so these are no adapters of mlx-lm or PEFT. It holds {names}"
        )
    source.small(files.config)
    return files


def import_adapter(
    source: ModelSource, files: AdapterFiles, base: Path | None, out: Path, *, chats: bool | None, check: Check
) -> GPTSizes:
    """Write adapters on one of our models into `out` as a checkpoint; return the sizes of the model.

    Args:
        source: where they are.
        files: their names there.
        base: the artifact that they were trained on.
        out: exists.
        chats: whether the model with them has learnt to chat; None: as its base.
        check: may raise, to end the work.

    Raises:
        DataError: a file is missing or damaged, or they do not fit the base; there is none.
    """
    import mlx.core as mx

    from mlxchat.data.tokenizer import Tokenizer
    from mlxchat.model.checkpoint import save_adapters
    from mlxchat.model.lora import check_shapes, read_adapter_config
    from mlxchat.store.bases import ADAPTER_KEY

    if base is None:
        raise DataError("adapters need a base: mlxchat import adapter FOLDER --base REF")
    sizes = sizes_from_hf(_json(base / "config.json"), f"{base.name}: config.json")
    paths = source.fetch(files.all(), check)
    with SafetensorsFile(paths[files.adapters]) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        if files.adapters == PEFT_FILE:
            adapter_sizes, ours = sizes_from_peft(_json(paths[files.config]), shapes, source.where)
            shapes = {ours[name]: peft_shape(ours[name], shape) for name, shape in shapes.items()}
        else:
            adapter_sizes = read_adapter_config(paths[files.config].parent, sizes)
            ours = {name: name for name in shapes}
        check_shapes(shapes, adapter_sizes, sizes, source.where)
        arrays = {
            ours[name]: np.concatenate([widen(piece, tensor.dtype) for piece in file.pieces(tensor)])
            .reshape(tensor.shape)
            for name, tensor in file.tensors.items()
        }  # fmt: skip
    if files.adapters == PEFT_FILE:
        arrays = {name: as_peft(name, value) for name, value in arrays.items()}
    strange = sorted(name for name, value in arrays.items() if not np.isfinite(value).all())
    if strange:
        raise DataError(f"{source.where}: {strange[0]} holds numbers that are not finite")
    check()
    below = {name: value for name, value in _json(base / "checkpoint.json").items() if name != ADAPTER_KEY}
    facts = {**below, "stage": "imported", "imported": {"format": "adapter"}}
    if chats is not None:
        facts["format"] = "chat" if chats else "base"
    save_adapters(
        out, {name: mx.array(value) for name, value in arrays.items()}, adapter_sizes, base=base, sizes=sizes,
        tokenizer=Tokenizer.load(base), facts=facts,
    )  # fmt: skip
    return sizes


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object")
    return content
