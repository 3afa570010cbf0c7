"""Imports from folders and from the Hub: equal numbers, sizes and token ids; identity by contents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.errors import ConfigError, DataError
from mlxchat.hub import client
from mlxchat.interop.importing import import_model, model_sizes, pins_of
from mlxchat.interop.source import outside_folder
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.store.fingerprint import hash_file

Twin = Any
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


def importing(twin: Twin, out: Path, **settings: Any) -> Path:
    out.mkdir()
    import_model(twin.config(**settings), out, lambda: None)
    return out


@pytest.mark.parametrize(("later", "prefix"), [(False, ""), (True, "_orig_mod.")])
def test_import_of_nanochats_is_bit_exact(twin, tmp_path, later, prefix):
    made = twin(later=later, prefix=prefix)
    out = importing(made, tmp_path / "out")
    save_file({name.removeprefix(prefix): value for name, value in made.tensors.items()}, tmp_path / "theirs",
              metadata={"format": "mlx"})  # fmt: skip
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    model, _, facts = load_checkpoint(out)
    assert (model.sizes, facts["imported"]["compiled"]) == (made.sizes, bool(prefix))
    assert (facts["format"], facts["iterations"], facts["imported"]["meta"]) == ("chat", 7, {"val_loss": 1.5})
    again = importing(made, tmp_path / "again", format="hf", folder=str(out))  # our own format
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert load_checkpoint(again)[0].sizes == made.sizes


@pytest.mark.parametrize(("chat", "expected"), [(None, "base"), (True, "chat")])
def test_meta_of_a_pretraining_means_base_model(twin, tmp_path, chat, expected):
    made = twin()
    path = made.folder / "meta_000007.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device_batch_size": 32, "max_seq_len": 64}))
    assert load_checkpoint(importing(made, tmp_path / "out", chat=chat))[2]["format"] == expected


def test_tokenizer_json_is_read(twin, tmp_path):
    """The tokenizer of nanochat's class for Hugging Face's library."""
    made = twin()
    expected = load_vocabulary(str(made.folder / "tokenizer.pkl"))[0]
    expected.save(made.folder)
    for name in ("tokenizer.pkl", "ranks.tiktoken", "tokenizer_config.json"):
        (made.folder / name).unlink()
    _, tokenizer, _ = load_checkpoint(importing(made, tmp_path / "out"))
    assert (tokenizer.ranks, tokenizer.special_ids) == (expected.ranks, expected.special_ids)


@pytest.mark.parametrize("saved_by", ["us", "transformers"])
def test_hugging_face_models_are_imported(twin, tmp_path, saved_by):
    """Transformers 5 writes the chat template, by which a chat model is recognised, into chat_template.jinja."""
    made, folder = twin(), tmp_path / "hf"
    folder.mkdir()
    save_file({theirs: made.tensors[ours] for theirs, ours in NAMES.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "attention_bias": False,
        "final_logit_softcapping": 15.0, "hidden_act": "relu2", "hidden_size": made.sizes.width,
        "intermediate_size": 4 * made.sizes.width, "max_position_embeddings": 64, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False,
        "vocab_size": made.sizes.vocab_size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = load_vocabulary(str(made.folder / "tokenizer.pkl"))[0]
    words.save(folder)
    (folder / "ranks.tiktoken").unlink()
    if saved_by == "transformers":
        transformers = pytest.importorskip("transformers")
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        assert (folder / "chat_template.jinja").is_file()
    out = importing(made, tmp_path / "out", format="hf", folder=str(folder))
    found = load_file(out / "model.safetensors")
    assert found.keys() == made.tensors.keys()
    assert all(np.array_equal(found[name], numbers) for name, numbers in made.tensors.items())
    model, tokenizer, facts = load_checkpoint(out)
    assert (model.sizes, facts["format"]) == (made.sizes, "chat")
    assert model_sizes(made.config(format="hf", folder=str(folder))) == made.sizes
    assert tokenizer.special_ids == words.special_ids
    assert tokenizer.encode("Hello ab world") == words.encode("Hello ab world")


# Models of the Hub


Twins = Callable[..., Twin]


def files_of(folder: Path, within: str = "") -> dict[str, bytes]:
    return {f"{within}{path.name}": path.read_bytes() for path in folder.iterdir()}


def offered(hub: Any, made: Twin, **more: Any) -> Any:
    """Offer a twin on the Hub; return what imports it."""
    hub.add("org/model", files_of(made.folder), kind="model", lfs=(".pt",), **more)
    return made.config(folder=None, repository="org/model")


def test_repository_and_folder_give_the_same_checkpoint(hub, twin, tmp_path):
    made = twin(prefix="_orig_mod.", later=True)
    config = offered(hub, made)
    assert pins_of(config, hash_file) == pins_of(made.config(), hash_file)
    assert model_sizes(config) == made.sizes
    assert hub.requests("model_000007.pt") == []  # the listing has its checksum
    for name, settings in (("a", config), ("b", made.config())):
        (tmp_path / name).mkdir()
        import_model(settings, tmp_path / name, lambda: None)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_folder_of_a_repository_is_imported(hub, twin):
    made = twin()
    files = files_of(made.folder, "chatsft_checkpoints/d2/") | files_of(twin("b", seed=3).folder, "mid_checkpoints/d2/")
    hub.add("org/all", files, kind="model", lfs=(".pt",))
    config = made.config(folder=None, repository="org/all/chatsft_checkpoints/d2")
    assert pins_of(config, hash_file) == pins_of(made.config(), hash_file)
    with pytest.raises(DataError, match=r"several models.*\n  org/all/chatsft_checkpoints/d2\n  org/all/mid_check"):
        pins_of(made.config(folder=None, repository="org/all"), hash_file)


def test_planning_works_offline_after_an_import(hub, twin, tmp_path, monkeypatch):
    config = offered(hub, twin())
    pins = pins_of(config, hash_file)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    client.forget()
    assert pins_of(config, hash_file) == pins
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="are not on this machine"):
        import_model(config, tmp_path / "out", lambda: None)


def test_no_code_is_downloaded(hub, twin, tmp_path):
    (tmp_path / "another").mkdir()
    import_model(twin().config(), tmp_path / "another", lambda: None)
    files = files_of(tmp_path / "another") | {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04."}
    hub.add("org/other", files, kind="model", lfs=(".safetensors",))
    folder = outside_folder("hf:org/other")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [path for path in folder.iterdir() if path.suffix in (".py", ".bin")]
    with pytest.raises(ConfigError, match="expected hf:FOLDER or hf:ORGANISATION/NAME"):
        outside_folder("hf:nothing")
