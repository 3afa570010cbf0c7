"""Model folders: bit-identical, reproducible, readable by mlx-lm, refused when damaged."""

import json
import os
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kit.models import make_model
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters


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
    assert all(np.asarray(before[name]).tobytes() == np.asarray(after[name]).tobytes() for name in before)
    assert (loaded.sizes, read.ranks, facts) == (model.sizes, tokenizer.ranks, {"stage": "pretrain", "format": "base"})


SAVE = """
import pathlib, sys, mlxchat
from kit.models import make_model
from mlxchat.data.bpe import train_tokenizer
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.parameters import init_weights
tokenizer, model = train_tokenizer(["the cat sat on the mat " * 5], 270), make_model(vocab_size=270)
init_weights(model, seed=3)
save_checkpoint(pathlib.Path(sys.argv[1]), model, tokenizer, {"stage": "sft", "format": "chat"})
"""


def test_two_processes_write_the_same_bytes_in_safe_formats(tmp_path):
    written = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        folder.mkdir()
        environ = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", SAVE, folder], env=environ, check=True, timeout=120)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {
        "model.safetensors", "config.json", "checkpoint.json", "tokenizer.json", "tokenizer_config.json",
        "ranks.tiktoken", "token_bytes.safetensors",
    }  # fmt: skip
    for data in written[0].values():
        with pytest.raises(ValueError):  # noqa: PT011  (must not be a pickle)
            list(pickletools.genops(data))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checkpoint.json", "ranks.tiktoken"])
def test_missing_and_truncated_files_are_refused(saved, name):
    data = (saved / name).read_bytes()
    for length in (0, len(data) // 2, len(data) - 3):
        (saved / name).write_bytes(data[:length])
        with pytest.raises(DataError):
            load_checkpoint(saved)
    (saved / name).unlink()
    with pytest.raises(DataError, match="checkpoint"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", None, "num_hidden_layers"),
        ("num_key_value_heads", 4, "weights do not match"),
        ("num_attention_heads", 0, "not a readable checkpoint"),
    ],
)
def test_missing_and_wrong_sizes_are_refused(saved, key, value, message):
    config = json.loads((saved / "config.json").read_text()) | {key: value}
    if value is None:
        del config[key]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        load_checkpoint(saved)
