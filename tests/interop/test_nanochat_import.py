"""Import of nanochat's checkpoints: equal numbers; faults are reported with their file."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.errors import DataError
from mlxchat.interop.importing import import_model
from mlxchat.interop.names import sizes_from_nanochat
from mlxchat.model.checkpoint import load_checkpoint

Twin = Any


def importing(twin: Twin, tmp_path: Path, **settings: Any) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    import_model(twin.config(**settings), out, lambda: None)
    return out


@pytest.mark.parametrize(("later", "prefix"), [(False, ""), (True, "_orig_mod.")])
def test_import_is_bit_exact(twin, tmp_path, later, prefix):
    made = twin(later=later, prefix=prefix)
    out = importing(made, tmp_path)
    save_file({name.removeprefix(prefix): value for name, value in made.tensors.items()}, tmp_path / "theirs",
              metadata={"format": "mlx"})  # fmt: skip
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    model, _, facts = load_checkpoint(out)
    assert (model.sizes, facts["imported"]["compiled"]) == (made.sizes, bool(prefix))
    assert (facts["format"], facts["iterations"], facts["imported"]["meta"]) == ("chat", 7, {"val_loss": 1.5})


@pytest.mark.parametrize(("chat", "expected"), [(None, "base"), (True, "chat")])
def test_meta_of_a_pretraining_means_base_model(twin, tmp_path, chat, expected):
    made = twin()
    path = made.folder / "meta_000007.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device_batch_size": 32, "max_seq_len": 64}))
    assert load_checkpoint(importing(made, tmp_path, chat=chat))[2]["format"] == expected


def test_tokenizer_json_is_read(twin, tmp_path):
    """The tokenizer of nanochat's class for Hugging Face's library."""
    made = twin()
    expected = load_vocabulary(str(made.folder / "tokenizer.pkl"))[0]
    expected.save(made.folder)
    for name in ("tokenizer.pkl", "ranks.tiktoken", "tokenizer_config.json"):
        (made.folder / name).unlink()
    _, tokenizer, _ = load_checkpoint(importing(made, tmp_path))
    assert (tokenizer.ranks, tokenizer.special_ids) == (expected.ranks, expected.special_ids)


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"archive/data/1") + 500] ^= 1
    path.write_bytes(bytes(data))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "README.md").touch()


MODEL, META, TOKENIZER = "model_000007.pt", "meta_000007.json", "tokenizer.pkl"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at, lay: (at / TOKENIZER).unlink(), r"has no tokenizer\.pkl, neither beside .* nor in tokenizer/"),
        (lambda at, lay: (at / META).unlink(), r"has model_000007\.pt, but no meta_000007\.json"),
        (lambda at, lay: cut(at / MODEL, -1000), r"model_000007\.pt is truncated.*Copy it again"),
        (lambda at, lay: flip_bit(at / MODEL), r"model_000007\.pt is damaged \(Bad CRC-32"),
        (lambda at, lay: (at / MODEL).write_text("version https://git-lfs.github.com/spec/v1\n"), r"git lfs pull"),
        (lambda at, lay: cut(at / TOKENIZER, -300), r"tokenizer\.pkl is damaged or is not"),
        (lambda at, lay: (at / TOKENIZER).write_bytes(pickle.dumps(lay.encoding_of(30))), r"tokenizer of another"),
        (lambda at, lay: (at / META).write_text('{"step": 7, "model_config"'), r"meta_000007\.json is damaged"),
        (
            lambda at, lay: (at / META).write_text((at / META).read_text().replace('"n_layer": 2', '"n_layer": 1')),
            r"does not match meta_000007\.json: .*is unknown",
        ),
        (lambda at, lay: empty(at), r"has no nanochat checkpoint.*It has README\.md"),
    ],
    ids=range(10),  # their messages are too long
)
def test_faulty_checkpoints_are_refused(twin, tmp_path, lay, spoil, message):
    made = twin()
    spoil(made.folder, lay)
    with pytest.raises(DataError, match=message):
        importing(made, tmp_path)


def test_versions_between_the_two_are_refused():
    meta = {"sequence_len": 256, "vocab_size": 1000, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    with pytest.raises(DataError, match="between October 2025 and July 2026"):
        sizes_from_nanochat(meta, ["resid_lambdas", "x0_lambdas"], "model_000001.pt")
