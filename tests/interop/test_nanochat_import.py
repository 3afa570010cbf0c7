"""Import of nanochat's checkpoints: equal numbers; faults are reported with their file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxchat.data.tokenizer import load_vocabulary
from mlxchat.data.vocabulary import SPECIAL_TOKENS
from mlxchat.errors import DataError
from mlxchat.interop.importing import import_model, pins_of
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.store.fingerprint import hash_file

Twin, Lay = Any, Any
Twins = Callable[..., Twin]


def importing(twin: Twin, tmp_path: Path, **settings: Any) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    import_model(twin.config(**settings), out, lambda: None)
    return out


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("later", [False, True])
def test_import_is_bit_exact(twin: Twins, tmp_path: Path, later: bool, prefix: str) -> None:
    made = twin(later=later, prefix=prefix)
    out = importing(made, tmp_path)
    found = load_file(out / "model.safetensors")
    assert found.keys() == made.tensors.keys()
    for name, numbers in made.tensors.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], numbers)
    model, _, facts = load_checkpoint(out)
    assert model.sizes == made.sizes
    assert facts["imported"]["compiled"] == bool(prefix)
    assert (facts["format"], facts["iterations"], facts["imported"]["meta"]) == ("chat", 7, {"val_loss": 1.5})


def test_written_file_equals_that_of_safetensors(twin: Twins, tmp_path: Path) -> None:
    made = twin(later=True)
    out = importing(made, tmp_path)
    save_file(made.tensors, tmp_path / "theirs.safetensors", metadata={"format": "mlx"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_last_step_is_the_default(twin: Twins, tmp_path: Path) -> None:
    twin(step=900, seed=1)
    made = twin(step=1000, seed=2)
    first, last = pins_of(made.config(step=900), hash_file), pins_of(made.config(), hash_file)
    assert "model model_001000.pt" in last
    assert "model model_000900.pt" in first
    with pytest.raises(DataError, match=r"no model of step 950; it has 900, 1000"):
        pins_of(made.config(step=950), hash_file)


def test_tokenizer_is_found_in_nanochats_folders(twin: Twins, tmp_path: Path) -> None:
    made = twin("base/chatsft_checkpoints/d2")
    (tmp_path / "base" / "tokenizer").mkdir()
    for name in ("tokenizer.pkl", "token_bytes.pt"):
        (made.folder / name).rename(tmp_path / "base" / "tokenizer" / name)
    pins = pins_of(made.config(), hash_file)
    assert pins == pins_of(made.config(folder=str(tmp_path / "base")), hash_file)
    twin("base/base_checkpoints/d2")
    with pytest.raises(DataError, match=r"several models.*\n.*base_checkpoints/d2\n.*chatsft_checkpoints/d2"):
        pins_of(made.config(folder=str(tmp_path / "base")), hash_file)


def say_base(folder: Path) -> None:
    """Make the meta file one of nanochat's base_train."""
    path = folder / "meta_000007.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device_batch_size": 32, "max_seq_len": 64}))


def test_pretrained_model_is_a_base_model(twin: Twins, tmp_path: Path) -> None:
    made = twin()
    say_base(made.folder)
    _, _, facts = load_checkpoint(importing(made, tmp_path))
    assert facts["format"] == "base"


def test_chat_setting_overrides_the_meta_file(twin: Twins, tmp_path: Path) -> None:
    made = twin()
    say_base(made.folder)
    _, _, facts = load_checkpoint(importing(made, tmp_path, chat=True))
    assert facts["format"] == "chat"


def test_token_bytes_of_october_2025_are_accepted(twin: Twins, tmp_path: Path, lay: Lay) -> None:
    made, encoding = twin(), lay.encoding_of()
    tokens = [encoding.decode_single_token_bytes(index) for index in range(encoding.n_vocab - 9)]
    lengths = [len(token.decode("utf-8", "replace").encode()) for token in tokens]
    assert lengths[200] == 3
    lay.write_torch(made.folder / "token_bytes.pt", lay.Tensor(np.array([*lengths, *[0] * 9], dtype=np.int64)))
    importing(made, tmp_path)


def write_tokenizer_json(folder: Path, specials_first: bool) -> None:
    """Replace tokenizer.pkl by the tokenizer.json of nanochat's class for Hugging Face's library."""
    load_vocabulary(str(folder / "tokenizer.pkl"))[0].save(folder)
    for name in ("tokenizer.pkl", "ranks.tiktoken", "tokenizer_config.json"):
        (folder / name).unlink()
    record = json.loads((folder / "tokenizer.json").read_text())
    if specials_first:
        record["model"]["vocab"] = {token: rank + 9 for token, rank in record["model"]["vocab"].items()}
        for rank, token in enumerate(record["added_tokens"]):
            token["id"] = rank
    (folder / "tokenizer.json").write_text(json.dumps(record))


def test_tokenizer_json_is_read(twin: Twins, tmp_path: Path) -> None:
    made = twin()
    expected = load_vocabulary(str(made.folder / "tokenizer.pkl"))[0]
    write_tokenizer_json(made.folder, specials_first=False)
    _, tokenizer, _ = load_checkpoint(importing(made, tmp_path))
    assert (tokenizer.ranks, tokenizer.special_ids) == (expected.ranks, expected.special_ids)


def test_leading_special_tokens_are_refused(twin: Twins, tmp_path: Path) -> None:
    made = twin()
    write_tokenizer_json(made.folder, specials_first=True)
    with pytest.raises(DataError, match=r"tokenizer\.json: the special token <\|.*\|> has id \d, expected 2\d\d"):
        importing(made, tmp_path)


def forget_tokenizer(folder: Path, lay: Lay) -> None:
    (folder / "tokenizer.pkl").unlink()


def forget_meta(folder: Path, lay: Lay) -> None:
    (folder / "meta_000007.json").unlink()


def cut_model(folder: Path, lay: Lay) -> None:
    path = folder / "model_000007.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def halve_model(folder: Path, lay: Lay) -> None:
    path = folder / "model_000007.pt"
    path.write_bytes(path.read_bytes()[:20000])


def flip_model(folder: Path, lay: Lay) -> None:
    path = folder / "model_000007.pt"
    data = bytearray(path.read_bytes())
    data[data.index(b"archive/data/1") + 500] ^= 1
    path.write_bytes(bytes(data))


def empty_model(folder: Path, lay: Lay) -> None:
    (folder / "model_000007.pt").write_bytes(b"")


def point_at_model(folder: Path, lay: Lay) -> None:
    (folder / "model_000007.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def cut_tokenizer(folder: Path, lay: Lay) -> None:
    path = folder / "tokenizer.pkl"
    path.write_bytes(path.read_bytes()[:-300])


def exchange_tokenizer(folder: Path, lay: Lay) -> None:
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(lay.encoding_of(30)))


def mix_up_token_bytes(folder: Path, lay: Lay) -> None:
    lay.write_torch(folder / "token_bytes.pt", lay.Tensor(np.full(285, 3, dtype=np.int32)))


def rename_special_token(folder: Path, lay: Lay) -> None:
    names = ("<|endoftext|>", *SPECIAL_TOKENS[1:])
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(lay.encoding_of(special=names)))


def name_registered_encoding(folder: Path, lay: Lay) -> None:
    # tiktoken's pickle of a built-in encoding.
    data = b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b."
    (folder / "tokenizer.pkl").write_bytes(data)


def break_meta(folder: Path, lay: Lay) -> None:
    (folder / "meta_000007.json").write_text('{"step": 7, "model_config"')


def shrink_meta(folder: Path, lay: Lay) -> None:
    path = folder / "meta_000007.json"
    meta = json.loads(path.read_text())
    meta["model_config"]["n_layer"] = 1
    path.write_text(json.dumps(meta))


def empty_folder(folder: Path, lay: Lay) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "README.md").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (forget_tokenizer, r"has no tokenizer\.pkl, neither beside model_000007\.pt nor in tokenizer/\. Copy it"),
        (forget_meta, r"has model_000007\.pt, but no meta_000007\.json"),
        (cut_model, r"model_000007\.pt is truncated.*Copy it again"),
        (halve_model, r"model_000007\.pt is truncated"),
        (flip_model, r"model_000007\.pt is damaged: the checksum of archive/data/1 differs"),
        (empty_model, r"model_000007\.pt is empty"),
        (point_at_model, r"is a Git LFS pointer.*git lfs pull"),
        (cut_tokenizer, r"tokenizer\.pkl is truncated or damaged"),
        (
            exchange_tokenizer,
            r"tokenizer\.pkl has 295 tokens, model_000007\.pt has 285: it is the tokenizer of another",
        ),
        (mix_up_token_bytes, r"token_bytes\.pt and tokenizer\.pkl do not match"),
        (rename_special_token, r"tokenizer\.pkl: the special token <\|bos\|> has id None, expected 276"),
        (name_registered_encoding, r"tokenizer\.pkl names the encoding 'gpt2' and has no vocabulary"),
        (break_meta, r"meta_000007\.json is not a nanochat meta file"),
        (shrink_meta, r"does not match meta_000007\.json: .*is unknown"),
        (empty_folder, r"has no nanochat checkpoint.*It has README\.md"),
    ],
)
def test_faulty_checkpoints_are_refused(
    twin: Twins, tmp_path: Path, lay: Lay, spoil: Callable[[Path, Lay], None], message: str
) -> None:
    made = twin()
    spoil(made.folder, lay)
    with pytest.raises(DataError, match=message):
        importing(made, tmp_path)
