"""A checkpoint as nanochat writes and publishes it: which files it is, what they say, and its tensors under our names.

model_000650.pt  meta_000650.json      at the top, or in a folder such as chatsft_checkpoints/d20/
tokenizer.pkl    token_bytes.pt        beside them or in tokenizer/; the second one only to compare
tokenizer.json                         instead of tokenizer.pkl: nanochat's earlier class wrote it
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlxchat.data.tokenizer import Tokenizer, load_vocabulary
from mlxchat.data.vocabulary import HF_FILE
from mlxchat.errors import DataError
from mlxchat.interop.hf import check_added_tokens
from mlxchat.interop.names import COMPILED_PREFIX, expected_shapes, ours_from_nanochat, sizes_from_nanochat
from mlxchat.interop.pickled_tokenizer import check_token_bytes, read_tokenizer
from mlxchat.interop.source import ModelSource
from mlxchat.interop.torch_file import TorchFile, TorchTensor
from mlxchat.model.sizes import GPTSizes

_MODEL = re.compile(r"model_(\d+)\.pt")
_FLOATS = ("float32", "bfloat16", "float16")
_MOST_SHOWN = 8


@dataclass(frozen=True)
class NanochatFiles:
    """The names of a checkpoint's files in its source."""

    step: int
    model: str
    meta: str
    tokenizer: str
    token_bytes: str | None

    def identity(self) -> list[str]:
        """Return the names of those that the model is made of."""
        return [self.model, self.meta, self.tokenizer]

    def all(self) -> list[str]:
        """Return the names of those that are read."""
        return [*self.identity(), *([self.token_bytes] if self.token_bytes else [])]


def find_files(source: ModelSource, step: int | None) -> NanochatFiles:
    """Return the files of a step's checkpoint, the last step's if none is given; nothing is fetched.

    Raises:
        DataError: there is none, there are several folders of them, or a file is missing.
    """
    models = {PurePosixPath(name): int(match[1]) for name in source.files if (match := _MODEL.fullmatch(_last(name)))}
    folders = sorted({path.parent for path in models})
    if not models:
        names = ", ".join(sorted(source.files)[:_MOST_SHOWN]) or "nothing"
        raise DataError(
            f"{source.where} holds no checkpoint of nanochat's: expected model_<step>.pt. It holds {names}. "
            "For a folder of Hugging Face's or mlx-lm's: mlxchat import hf"
        )
    if len(folders) > 1:
        shown = "\n".join(f"  {source.where}/{folder}" for folder in folders[:_MOST_SHOWN])
        raise DataError(f"{source.where} holds several models. Say which one:\n{shown}")
    steps = {found: path for path, found in sorted(models.items(), key=lambda item: item[1])}
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise DataError(f"{source.where} has no model of step {step}; it has {', '.join(map(str, steps))}")
    model, folder = steps[chosen], folders[0]
    meta = _join(folder, _last(str(model)).replace("model_", "meta_").replace(".pt", ".json"))
    if not source.has(meta):
        raise DataError(
            f"{source.where} has {model}, but no {meta}, which says what sizes it has. Copy it from where the model "
            "was trained"
        )
    places = [folder, PurePosixPath("tokenizer"), *folder.parents, *(each / "tokenizer" for each in folder.parents)]
    wanted = [_join(place, name) for name in ("tokenizer.pkl", HF_FILE) for place in places]
    tokenizer = next((name for name in wanted if source.has(name)), None)
    if tokenizer is None:
        raise DataError(
            f"{source.where} has no tokenizer.pkl, neither beside {model} nor in tokenizer/. Copy it from where the "
            f"model was trained (nanochat keeps it in ~/.cache/nanochat/tokenizer)"
        )
    token_bytes = _join(PurePosixPath(tokenizer).parent, "token_bytes.pt")
    return NanochatFiles(chosen, str(model), meta, tokenizer, token_bytes if source.has(token_bytes) else None)


def read_meta(data: bytes, where: str) -> dict[str, Any]:
    """Return what a meta_*.json says.

    Raises:
        DataError: it is damaged, or of another kind.
    """
    try:
        meta = json.loads(data)
        assert isinstance(meta, dict)
        assert isinstance(meta["model_config"], dict)
    except (ValueError, KeyError, AssertionError, RecursionError) as error:
        reason = "model_config is missing" if isinstance(error, KeyError | AssertionError) else error
        raise DataError(f"{where} is no meta file of nanochat's ({reason}). Fetch or copy it again.") from None
    return meta


def facts_of(meta: dict[str, Any], files: NanochatFiles, chat: bool | None) -> dict[str, Any]:
    """Return what checkpoint.json says of a checkpoint.

    Args:
        meta: of meta_*.json.
        files: its step. What the folders are called decides nothing: the same files make the same checkpoint.
        chat: whether it has learnt to chat; None: unless the meta file is one of pretraining.
    """
    if chat is None:
        chat = "device_batch_size" not in meta  # which only pretraining writes
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
    file: TorchFile, meta: dict[str, Any], meta_name: str
) -> tuple[GPTSizes, dict[str, TorchTensor], dict[str, Any]]:
    """Return the sizes, the tensors under our names, and how they were stored: `compiled`, `dtypes` but float32.

    Raises:
        DataError: the tensors are not those that the meta file describes.
    """
    where = file.where
    tensors = file.tensors()
    renamed = {ours_from_nanochat(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise DataError(f"{where} holds some tensors twice, with and without {COMPILED_PREFIX}")
    sizes = sizes_from_nanochat(meta["model_config"], renamed, f"{where} with {meta_name}")
    expected = expected_shapes(sizes)
    problems = [f"{name} is missing" for name in expected.keys() - renamed.keys()]
    problems += [f"{name} is unknown" for name in renamed.keys() - expected.keys()]
    for name in expected.keys() & renamed.keys():
        tensor = renamed[name]
        if tensor.shape != expected[name]:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype.name not in _FLOATS:
            problems.append(f"{name} holds {tensor.dtype.name}, expected one of {', '.join(_FLOATS)}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise DataError(f"{where} is not the model that {meta_name} describes: {'; '.join(sorted(problems)[:4])}{more}")
    dtypes = {name: tensor.dtype.name for name, tensor in renamed.items() if tensor.dtype.name != "float32"}
    order = {name: renamed[name] for name in expected}
    stored = {
        "compiled": any(name.startswith(COMPILED_PREFIX) for name in tensors),
        "dtypes": dict(sorted(dtypes.items())),
    }
    return sizes, order, stored


def read_matching_tokenizer(paths: dict[str, Path], files: NanochatFiles, sizes: GPTSizes) -> Tokenizer:
    """Return the tokenizer, compared with the model and with token_bytes.pt.

    Raises:
        DataError: it is damaged, or another model's.
    """
    path = paths[files.tokenizer]
    if path.name == HF_FILE:
        tokenizer, _ = load_vocabulary(str(path))
        check_added_tokens(path, tokenizer)
    else:
        tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size != sizes.vocab_size:
        raise DataError(
            f"{files.tokenizer} has {tokenizer.vocab_size:,} tokens, {files.model} has {sizes.vocab_size:,}: it is the "
            "tokenizer of another model. Put the right tokenizer.pkl (and token_bytes.pt) beside the model"
        )
    if files.token_bytes is not None:
        check_token_bytes(paths[files.token_bytes], tokenizer)
    return tokenizer


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _join(folder: PurePosixPath, name: str) -> str:
    return str(folder / name)
