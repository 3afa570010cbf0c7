"""Import and export are bit-exact, and written files contain no code."""

import json
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.interop import exporting
from mlxchat.interop.importing import import_model
from mlxchat.interop.torch_files import read_state

Twin = Any
# Names that PyTorch's safe loader allows.
HARMLESS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
            "torch BFloat16Storage", "torch IntStorage"}  # fmt: skip

# Opcodes of torch/_weights_only_unpickler.py.
OPCODES = {
    "PROTO", "STOP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "SETITEM", "SETITEMS", "MARK", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "EMPTY_TUPLE", "EMPTY_DICT", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE",
    "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip


def come_in(twin: Twin, out: Path, **settings: Any) -> exporting.Checkpoint:
    out.mkdir()
    import_model(twin.config(**settings), out, lambda: None)
    return exporting.open_checkpoint(out)


def written(twin: Twin, folder: Path) -> tuple[Path, str]:
    """Import a twin and write it for nanochat; return the folder, and the snapshot of nanochat that reads it."""
    out = folder / "back"
    out.mkdir()
    return out, exporting.write_nanochat(come_in(twin, folder / "ours"), out)


def bits_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return name → type, shape and bytes of a .pt file's tensors."""
    return {
        name: (tensor.dtype.name, tensor.shape, tensor.read().tobytes()) for name, tensor in read_state(path).items()
    }


def globals_of(data: bytes) -> set[str]:
    """Return the names in a pickle; fails if it has an opcode that PyTorch's safe loader does not read."""
    found = list(pickletools.genops(data))
    assert {op.name for op, *_ in found} <= OPCODES | {"SHORT_BINBYTES"}  # tokenizer.pkl, which tiktoken reads
    return {str(argument) for op, argument, _ in found if op.name == "GLOBAL"}


@pytest.mark.parametrize(("later", "prefix"), [(False, ""), (True, "_orig_mod.")])
def test_nanochat_round_trip_is_bit_exact(twin, tmp_path, later, prefix):
    made = twin(later=later, prefix=prefix)
    out, snapshot = written(made, tmp_path)
    assert snapshot == ("jul2026" if later else "oct2025")
    assert bits_of(out / "model_000007.pt") == bits_of(made.folder / "model_000007.pt")
    metas = [json.loads((folder / "meta_000007.json").read_text()) for folder in (out, made.folder)]
    assert metas[0] == metas[1]


def test_written_tokenizer_unpickles_as_tiktokens(twin, tmp_path):
    made = twin()
    out, _ = written(made, tmp_path)
    found = pickle.loads((out / "tokenizer" / "tokenizer.pkl").read_bytes())
    expected = pickle.loads((made.folder / "tokenizer.pkl").read_bytes())
    assert found.__getstate__() == expected.__getstate__()
    assert found.encode_ordinary("abc 123 it's") == expected.encode_ordinary("abc 123 it's")
    with zipfile.ZipFile(out / "tokenizer" / "token_bytes.pt") as archive:
        lengths = np.frombuffer(archive.read("token_bytes/data/0"), np.int32)
    assert np.array_equal(lengths, Tokenizer(expected._mergeable_ranks).token_bytes)


def test_written_pickles_name_nothing_that_runs(twin, tmp_path):
    out, _ = written(twin(later=True), tmp_path)
    for path in (out / "model_000007.pt", out / "tokenizer" / "token_bytes.pt"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert globals_of(archive.read(f"{path.stem}/data.pkl")) <= HARMLESS
    assert globals_of((out / "tokenizer" / "tokenizer.pkl").read_bytes()) == {"tiktoken.core Encoding"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hugging_face_round_trip_is_byte_exact(twin, tmp_path, dtype):
    theirs, out = tmp_path / "theirs", tmp_path / "back"
    for folder in (theirs, out):
        folder.mkdir()
    exporting.write_hf(come_in(twin(), tmp_path / "ours"), theirs, dtype=dtype)
    made = twin("unused")
    again = come_in(made, tmp_path / "again", format="hf", folder=str(theirs))
    exporting.write_hf(again, out)
    assert (out / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((out / name).read_text()) == json.loads((theirs / name).read_text())
