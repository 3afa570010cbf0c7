"""Reads nanochat's checkpoints.

model_000650.pt  meta_000650.json      at the top, or in a folder such as chatsft_checkpoints/d20/
tokenizer.pkl                          beside them or in tokenizer/
tokenizer.json                         instead of tokenizer.pkl, written by an earlier class of nanochat

tokenizer.pkl is a pickled tiktoken encoding; its code is never executed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mlxchat.data.vocabulary import HF_FILE, PICKLED_FILE
from mlxchat.errors import DataError
from mlxchat.interop.names import COMPILED_PREFIX, check_tensors, sizes_from_nanochat
from mlxchat.interop.source import ModelSource, read_json
from mlxchat.interop.tensors import Tensor
from mlxchat.model.sizes import GPTSizes

_MODEL = re.compile(r"model_(\d+)\.pt")
_MOST_SHOWN = 8


@dataclass(frozen=True)
class NanochatFiles:
    """The names of a checkpoint's files in its source."""

    step: int
    model: str
    meta: str
    tokenizer: str

    def identity(self) -> list[str]:
        """Return the names of the files that determine the model."""
        return [self.model, self.meta, self.tokenizer]

    def all(self) -> list[str]:
        """Return the names of all files that are read."""
        return self.identity()


def find_files(source: ModelSource, step: int | None) -> NanochatFiles:
    """Return the files of the checkpoint of a step (None: the last); nothing is downloaded."""
    paths = [PurePosixPath(name) for name in source.files]
    models = {path: int(match[1]) for path in paths if (match := _MODEL.fullmatch(path.name))}
    folders = sorted({path.parent for path in models})
    if not models:
        raise DataError(
            f"{source.where} has no nanochat checkpoint: expected model_<step>.pt. It has {source.listed()}. For a "
            "folder in Hugging Face's or mlx-lm's format: mlxchat import hf"
        )
    if len(folders) > 1:
        shown = "\n".join(f"  {source.where}/{folder}" for folder in folders[:_MOST_SHOWN])
        raise DataError(f"{source.where} has several models. Choose one:\n{shown}")
    steps = {found: path for path, found in sorted(models.items(), key=lambda item: item[1])}
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise DataError(f"{source.where} has no model of step {step}; it has {', '.join(map(str, steps))}")
    model, folder = steps[chosen], folders[0]
    meta = str(folder / model.name.replace("model_", "meta_").replace(".pt", ".json"))
    copy = "Copy it from where the model was trained"
    if not source.has(meta):
        raise DataError(f"{source.where} has {model}, but no {meta} with its sizes. {copy}")
    places = [folder, PurePosixPath("tokenizer"), *folder.parents, *(each / "tokenizer" for each in folder.parents)]
    wanted = [str(place / name) for name in (PICKLED_FILE, HF_FILE) for place in places]
    tokenizer = next((name for name in wanted if source.has(name)), None)
    if tokenizer is None:
        nowhere = f"{source.where} has no tokenizer.pkl, neither beside {model} nor in tokenizer/"
        raise DataError(f"{nowhere}. {copy} (nanochat keeps it in ~/.cache/nanochat/tokenizer)")
    return NanochatFiles(chosen, str(model), meta, tokenizer)


def read_meta(data: bytes, where: str) -> dict[str, Any]:
    """Return the contents of a meta_*.json."""
    meta = read_json(data, where)
    if not isinstance(meta.get("model_config"), dict):
        raise DataError(f"{where} is not a nanochat meta file: it has no model_config. Copy it again.")
    return meta


def facts_of(meta: dict[str, Any], files: NanochatFiles, chat: bool | None) -> dict[str, Any]:
    """Return the contents of checkpoint.json. `chat` None: a chat model unless the meta file is pretraining's.

    Only the step is recorded of `files`, so that equal files give equal checkpoints.
    """
    if chat is None:
        chat = "device_batch_size" not in meta  # written only by pretraining
    numbers = {key: value for key, value in meta.items() if isinstance(value, int | float) and key != "step"}
    batch = meta.get("total_batch_size")
    return {
        "stage": "imported",
        "format": "chat" if chat else "base",
        "iterations": files.step,
        **({"pretrain_batch_tokens": batch} if isinstance(batch, int) else {}),
        "imported": {"format": "nanochat", "step": files.step, "meta": numbers},
    }


def read_model(
    tensors: Mapping[str, Tensor], meta: dict[str, Any], where: str, meta_name: str
) -> tuple[GPTSizes, dict[str, Tensor], dict[str, Any]]:
    """Return the sizes, the tensors by our names, and stored facts: `compiled`, and `dtypes` other than float32."""
    renamed = {name.removeprefix(COMPILED_PREFIX): tensor for name, tensor in tensors.items()}
    sizes = sizes_from_nanochat(meta["model_config"], renamed, f"{where} with {meta_name}")
    fault = f"{where} does not match {meta_name}"
    check_tensors(((name, name, tensor.shape) for name, tensor in renamed.items()), sizes, fault)
    if others := [name for name, tensor in renamed.items() if not tensor.dtype.code]:
        raise DataError(f"{fault}: {others[0]} has type {renamed[others[0]].dtype.name}, expected a type of floats")
    dtypes = {name: tensor.dtype.name for name, tensor in renamed.items() if tensor.dtype.name != "float32"}
    compiled = any(name.startswith(COMPILED_PREFIX) for name in tensors)
    return sizes, renamed, {"compiled": compiled, "dtypes": dict(sorted(dtypes.items()))}
