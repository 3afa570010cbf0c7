"""Import of NanoChatForCausalLM: equal numbers and token ids; refusal of other models."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxchat.config.schema import ImportConfig
from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.errors import DataError
from mlxchat.interop.importing import import_model, model_sizes
from mlxchat.model.checkpoint import load_checkpoint

Twin = Any
Twins = Callable[..., Twin]
# transformers' names, independent of the tested map.
LAYER = {
    "self_attn.q_proj": "attn.c_q", "self_attn.k_proj": "attn.c_k", "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
NAMES = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "lm_head.weight": "lm_head.weight",
    **{
        f"model.layers.{layer}.{theirs}.weight": f"transformer.h.{layer}.{ours}.weight"
        for layer in range(2)
        for theirs, ours in LAYER.items()
    },
}


def config_of(folder: Path) -> ImportConfig:
    return ImportConfig(
        name="x", format="hf", repository=None, revision="main", folder=str(folder), step=None, chat=None
    )


def take(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    import_model(config_of(folder), out, lambda: None)
    return out


@pytest.fixture
def hf(twin: Twins, tmp_path: Path) -> Twin:
    """A model as transformers writes it, with the numbers of a twin."""
    made = twin()
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({theirs: made.tensors[ours] for theirs, ours in NAMES.items()}, folder / "model.safetensors")
    sizes = made.sizes
    config = {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "attention_bias": False,
        "final_logit_softcapping": 15.0, "hidden_act": "relu2", "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width, "max_position_embeddings": 64, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False,
        "vocab_size": sizes.vocab_size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    load_vocabulary(str(made.folder / "tokenizer.pkl"))[0].save(folder)
    (folder / "ranks.tiktoken").unlink()
    made.folder = folder
    return made


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_numbers_sizes_and_token_ids_are_equal(hf, tmp_path):
    out = take(hf.folder, tmp_path)
    found = load_file(out / "model.safetensors")
    assert found.keys() == hf.tensors.keys()
    assert all(np.array_equal(found[name], numbers) for name, numbers in hf.tensors.items())
    model, tokenizer, facts = load_checkpoint(out)
    assert (model.sizes, facts["format"]) == (hf.sizes, "chat")
    assert model_sizes(config_of(hf.folder)) == hf.sizes
    theirs = json.loads((hf.folder / "tokenizer.json").read_text())
    assert {token["content"]: token["id"] for token in theirs["added_tokens"]} == tokenizer.special_ids
    assert tokenizer.encode("Hello ab world") == load_vocabulary(
        str(tmp_path / "twin" / "tokenizer.pkl")
    )[0].encode("Hello ab world")  # fmt: skip


def test_chat_model_saved_by_transformers_stays_one(hf, tmp_path):
    # Guards against chat_template.jinja, written by transformers 5, not being read.
    transformers = pytest.importorskip("transformers")
    transformers.AutoTokenizer.from_pretrained(hf.folder).save_pretrained(hf.folder)
    assert "chat_template" not in json.loads((hf.folder / "tokenizer_config.json").read_text())
    assert (hf.folder / "chat_template.jinja").is_file()
    _, tokenizer, facts = load_checkpoint(take(hf.folder, tmp_path))
    assert (facts["format"], tokenizer.vocab_size) == ("chat", hf.sizes.vocab_size)


@pytest.mark.parametrize("later", [False, True])
def test_our_checkpoints_can_be_imported(twin, tmp_path, later):
    made = twin(later=later)
    first = tmp_path / "first"
    first.mkdir()
    import_model(made.config(), first, lambda: None)
    again = take(first, tmp_path)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert load_checkpoint(again)[0].sizes == made.sizes


FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (
        lambda folder: change(folder, model_type="llama", architectures=["LlamaForCausalLM"]),
        r"LlamaForCausalLM.*\n.*pipeline=outside outside.path.*\n.*--model hf:FOLDER",
    ),
    (
        lambda folder: change(folder, final_logit_softcapping=30.0, hidden_act="gelu"),
        r"hidden_act gelu \(expected relu2\), final_logit_softcapping 30.0 \(expected 15.0\)",
    ),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"has no model.safetensors. pytorch_model.bin is a pickle, which is not read",
    ),
    (
        lambda folder: os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100),
        r"model.safetensors is truncated or not a safetensors file",
    ),
    (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer.json"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_faulty_models_are_refused(hf, tmp_path, spoil, message):
    spoil(hf.folder)
    with pytest.raises(DataError, match=message):
        take(hf.folder, tmp_path)
