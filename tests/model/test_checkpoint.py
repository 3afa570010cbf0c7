"""Model folders: bit-identical, reproducible, readable by mlx-lm, refused when damaged."""

import hashlib
import json
import os
import pickletools
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from kit.models import make_model
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters

FILES = {
    "model.safetensors", "config.json", "checkpoint.json", "tokenizer.json", "tokenizer_config.json",
    "ranks.tiktoken", "token_bytes.safetensors",
}  # fmt: skip


@pytest.fixture
def model(tokenizer: Tokenizer) -> GPT:
    return make_model(vocab_size=tokenizer.vocab_size)


@pytest.fixture
def saved(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_checkpoint(folder, model, tokenizer, {"stage": "pretrain", "format": "base"})
    return folder


def test_round_trip_is_bit_identical(model, tokenizer, saved):
    loaded, read, facts = load_checkpoint(saved)
    before, after = flatten_parameters(model), flatten_parameters(loaded)
    assert before.keys() == after.keys()
    for name in before:
        assert np.asarray(before[name]).tobytes() == np.asarray(after[name]).tobytes()
    ids = mx.array([tokenizer.encode("the cat sat")])
    assert mx.array_equal(loaded(ids), model(ids)).item()
    assert (loaded.sizes, read.ranks) == (model.sizes, tokenizer.ranks)
    assert facts == {"stage": "pretrain", "format": "base"}


def test_weights_are_written_in_float32(model, tokenizer, tmp_path):
    set_parameters(model, {name: value.astype(mx.bfloat16) for name, value in flatten_parameters(model).items()})
    save_checkpoint(tmp_path, model, tokenizer, {})
    arrays = load_file(tmp_path / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    name = "transformer.h.0.mlp.c_proj.weight"  # not transposed
    np.testing.assert_array_equal(arrays[name], np.asarray(flatten_parameters(model)[name].astype(mx.float32)))


SAVE = """
import hashlib, pathlib, sys, mlxchat
from mlxchat.data.bpe import train_tokenizer
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.gpt import init_weights
from mlxchat.model.sizes import GPTSizes
tokenizer = train_tokenizer(["the cat sat on the mat " * 5], 270)
sizes = GPTSizes(
    vocab_size=270, num_layers=2, num_heads=2, num_kv_heads=1, width=16, context_tokens=8, rope_theta=1e4
)
model = GPT(sizes)
init_weights(model, seed=3)
folder = pathlib.Path(sys.argv[1]); folder.mkdir()
save_checkpoint(folder, model, tokenizer, {"stage": "sft", "format": "chat"})
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    digests = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        subprocess.run(
            [sys.executable, "-c", SAVE, folder], env=os.environ | {"PYTHONHASHSEED": hash_seed}, check=True, timeout=60
        )
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()})
    assert digests[0] == digests[1]
    assert digests[0].keys() == FILES


def test_files_are_safe_formats(saved):
    assert {path.name for path in saved.iterdir()} == FILES
    for path in saved.iterdir():
        with pytest.raises(ValueError):  # noqa: PT011  (must not be a pickle)
            list(pickletools.genops(path.read_bytes()))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checkpoint.json", "ranks.tiktoken"])
def test_missing_and_truncated_files_are_refused(saved, name):
    data = (saved / name).read_bytes()
    for part in (0.0, 0.1, 0.5, 0.999):
        (saved / name).write_bytes(data[: min(int(part * len(data)), len(data) - 3)])
        with pytest.raises(DataError):
            load_checkpoint(saved)
    (saved / name).unlink()
    with pytest.raises(DataError, match="checkpoint"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *((key, None, key) for key in ("vocab_size", "num_hidden_layers", "num_key_value_heads", "rope_theta")),
        *((key, value, "weights do not match") for key, value in (
            ("num_hidden_layers", 1), ("num_hidden_layers", 3), ("vocab_size", 281), ("num_key_value_heads", 4),
        )),
        ("num_attention_heads", 0, "num_heads is 0"),
    ],
)  # fmt: skip
def test_missing_and_wrong_sizes_are_refused(saved, key, value, message):
    config = json.loads((saved / "config.json").read_text()) | {key: value}
    if value is None:
        del config[key]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        load_checkpoint(saved)


def test_tokenizer_of_another_size_is_refused(saved):
    train_tokenizer(["the cat sat on the mat"], 270).save(saved)
    with pytest.raises(DataError, match="270 tokens, the model 280"):
        load_checkpoint(saved)
