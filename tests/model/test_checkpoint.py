"""A model folder: bit-identical, the same bytes everywhere, opened by others, and refused when it is damaged."""

from __future__ import annotations

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
from safetensors.numpy import load_file, save_file

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


def test_weights_come_back_bit_identical(model: GPT, saved: Path) -> None:
    loaded, _, _ = load_checkpoint(saved)
    before, after = flatten_parameters(model), flatten_parameters(loaded)
    assert before.keys() == after.keys()
    for name in before:
        assert np.asarray(before[name]).tobytes() == np.asarray(after[name]).tobytes()


def test_logits_sizes_tokenizer_and_facts_come_back(model: GPT, tokenizer: Tokenizer, saved: Path) -> None:
    loaded, read, facts = load_checkpoint(saved)
    ids = mx.array([tokenizer.encode("the cat sat")])
    assert mx.array_equal(loaded(ids), model(ids)).item()
    assert loaded.sizes == model.sizes
    assert read.ranks == tokenizer.ranks
    assert facts == {"stage": "pretrain", "format": "base"}


def test_weights_are_written_in_float32_whatever_they_were(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> None:
    set_parameters(model, {name: value.astype(mx.bfloat16) for name, value in flatten_parameters(model).items()})
    save_checkpoint(tmp_path, model, tokenizer, {})
    arrays = load_file(tmp_path / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    name = "transformer.h.0.mlp.c_proj.weight"  # stored as it is, not transposed
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


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        subprocess.run(
            [sys.executable, "-c", SAVE, folder], env=os.environ | {"PYTHONHASHSEED": hash_seed}, check=True, timeout=60
        )
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()})
    assert digests[0] == digests[1]
    assert digests[0].keys() == FILES


def test_config_has_the_fields_that_mlx_lm_reads(model: GPT, tokenizer: Tokenizer, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    expected = {
        "model_type": "nanochat", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 280, "max_position_embeddings": 64, "intermediate_size": 128,
        "rope_theta": 10_000.0,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert config["bos_token_id"] == tokenizer.special_ids["<|bos|>"]
    assert config["eos_token_id"] == tokenizer.special_ids["<|assistant_end|>"]


def test_a_folder_holds_safe_formats_only(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    for path in saved.iterdir():
        with pytest.raises(ValueError):  # noqa: PT011  (whatever pickle says: it must not be one)
            list(pickletools.genops(path.read_bytes()))


def test_mlx_opens_the_weights(model: GPT, saved: Path) -> None:
    arrays = mx.load(str(saved / "model.safetensors"))
    assert isinstance(arrays, dict)
    assert arrays.keys() == flatten_parameters(model).keys()


# Refusals


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checkpoint.json", "ranks.tiktoken"])
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(DataError, match="checkpoint"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checkpoint.json", "ranks.tiktoken"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.999])
def test_a_file_cut_short_is_refused(saved: Path, name: str, part: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: min(int(part * len(data)), len(data) - 3)])
    with pytest.raises(DataError):
        load_checkpoint(saved)


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "num_key_value_heads", "rope_theta"])
def test_a_config_without_a_size_is_refused(saved: Path, key: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config[key]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=key):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 1), ("num_hidden_layers", 3), ("vocab_size", 281), ("hidden_size", 64),
     ("num_key_value_heads", 4)],
)  # fmt: skip
def test_weights_of_other_sizes_than_the_config_are_refused(saved: Path, key: str, value: int) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(DataError, match="weights do not fit"):
        load_checkpoint(saved)


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads"])
def test_a_number_of_heads_that_does_not_divide_is_refused(saved: Path, key: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {key: 3}))
    with pytest.raises(DataError):
        load_checkpoint(saved)


def test_a_zero_number_of_heads_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    with pytest.raises(DataError):
        load_checkpoint(saved)


def test_an_unknown_weight_is_named(saved: Path) -> None:
    arrays = load_file(saved / "model.safetensors")
    save_file(arrays | {"resid_lambdas": np.ones(3, np.float32)}, saved / "model.safetensors")
    with pytest.raises(DataError, match="resid_lambdas"):
        load_checkpoint(saved)


def test_a_tokenizer_of_another_size_is_refused(saved: Path) -> None:
    train_tokenizer(["the cat sat on the mat"], 270).save(saved)
    with pytest.raises(DataError, match="270 tokens, the model 280"):
        load_checkpoint(saved)
