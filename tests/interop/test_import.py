"""Imports from folders and from the Hub: equal numbers, sizes and ids, identity by contents; round trips; the verb."""

import json
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxchat.cli import dispatch
from mlxchat.composition.compose import compose_config
from mlxchat.data.tokenizer import Tokenizer, load_vocabulary
from mlxchat.errors import ConfigError, DataError
from mlxchat.hub import client
from mlxchat.interop import exporting
from mlxchat.interop.importing import import_model, model_sizes, pins_of
from mlxchat.interop.source import outside_folder
from mlxchat.interop.torch_files import read_state
from mlxchat.model.checkpoint import load_checkpoint
from mlxchat.pipeline import plan_of
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.fingerprint import hash_file
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the test's own folder, where outputs/ is."""
    monkeypatch.chdir(tmp_path)


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


# Round trips through both formats, whose files contain no code


# Names that PyTorch's safe loader allows.
HARMLESS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
            "torch BFloat16Storage", "torch IntStorage"}  # fmt: skip

# Opcodes of torch/_weights_only_unpickler.py.
OPCODES = {
    "PROTO", "STOP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "SETITEM", "SETITEMS", "MARK", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "EMPTY_TUPLE", "EMPTY_DICT", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE",
    "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip


def written(twin: Twin, folder: Path) -> tuple[Path, str]:
    """Import a twin and write it for nanochat; return the folder, and the snapshot of nanochat that reads it."""
    out = folder / "back"
    out.mkdir()
    return out, exporting.write_nanochat(exporting.open_checkpoint(importing(twin, folder / "ours")), out)


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
    exporting.write_hf(exporting.open_checkpoint(importing(twin(), tmp_path / "ours")), theirs, dtype=dtype)
    again = importing(twin("unused"), tmp_path / "again", format="hf", folder=str(theirs))
    exporting.write_hf(exporting.open_checkpoint(again), out)
    assert (out / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((out / name).read_text()) == json.loads((theirs / name).read_text())


RL = ("pipeline=imported_rl", "stage=rl", "machine=cpu", "rl.num_iterations=1")


def take(*words: str) -> Path:
    assert dispatch(["import", "nanochat", *words]) == 0
    (place,) = Path("outputs/store").glob("imported-*")
    return place


def plan(*settings: str) -> dict[str, PlannedStep]:
    config = compose_config(list(settings)).config
    return {step.name: step for step in plan_of(config, Store(Path(config.outputs)))}


def test_import_is_made_once_and_may_have_several_names(twin, capfd):
    made = twin("org/some-model")
    place = take(str(made.folder))
    assert place.name.startswith("imported-some_model-")
    manifest = read_manifest(place)
    assert (manifest["kind"], manifest["stage"]) == ("checkpoint", "imported")
    assert {Path(each["url"]).name for each in manifest["externals"]} == {
        "model_000007.pt", "meta_000007.json", "tokenizer.pkl",
    }  # fmt: skip
    assert all(len(each["sha256"]) == 64 for each in manifest["externals"])
    assert take(str(made.folder), "--name", "again") == place
    store = Store(Path("outputs"))
    assert resolve(store, "import:some-model") == resolve(store, "import:again") == place
    assert "import:again is imported-some_model-" in capfd.readouterr().out


def test_rl_key_does_not_depend_on_the_reference(twin):
    made = twin("model")
    take(str(made.folder), "--name", "d2")
    alone = ("~pipeline.imported", "~pipeline.eval_imported", "pipeline.rl.checkpoint=import:d2")
    from_name, from_stage = plan(*RL, *alone), plan(*RL, f"imported.folder={made.folder}")
    assert from_stage["imported"].state == "done"
    assert from_name["rl"].key == from_stage["rl"].key
    assert set(from_name) == {"rl"}
    assert from_name["rl"].title == "rl-d2"


def test_import_name_can_be_replaced_and_removed(twin):
    first, second = twin("first", seed=1), twin("second", seed=2)
    take(str(first.folder), "--name", "x")
    before = resolve(Store(Path("outputs")), "import:x")
    with pytest.raises(ConfigError, match=r"import:x is another model.*--forget x"):
        dispatch(["import", "nanochat", str(second.folder), "--name", "x"])
    assert dispatch(["import", "--forget", "x"]) == 0
    dispatch(["import", "nanochat", str(second.folder), "--name", "x"])
    assert resolve(Store(Path("outputs")), "import:x") != before
    assert dispatch(["import", "--forget", "x"]) == 0
    with pytest.raises(ConfigError, match='there is no import "x"'):
        dispatch(["import", "--forget", "x"])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["hf"], ConfigError, "expected mlxchat import FORMAT WHAT"),
        (["nanochat", "./nothing"], DataError, "nothing does not exist"),
        (["nanochat", "d32"], ConfigError, "neither a folder nor a repository of the Hub"),
        (["nanochat", ".", "--name", "a/b"], ConfigError, '"a/b" is not an import name'),
        (["./a_folder"], ConfigError, "expected mlxchat import nanochat.hf.adapter, got"),
    ],
)
def test_wrong_arguments_are_refused(words, error, message):
    with pytest.raises(error, match=message):
        dispatch(["import", *words])


def test_rl_chat_and_evaluation_accept_an_import(twin, say, tmp_path, tiny):
    take(str(twin().folder), "--name", "x")
    wiring = (
        "pipeline=imported_rl", "~pipeline.imported", "pipeline.rl.checkpoint=import:x",
        "pipeline.eval_imported.checkpoint=import:x",
    )  # fmt: skip
    say(*tiny, *wiring)
    made = resolve(Store(tmp_path / "outputs"), "rl")
    assert json.loads((made / "checkpoint.json").read_text())["imported"]["step"] == 7
    scored = json.loads((resolve(Store(tmp_path / "outputs"), "eval_imported") / "manifest.json").read_text())
    assert scored["inputs"]["checkpoint"]["step"] == "imported"
    assert "checkpoint: imported-x-" in say("lineage", "rl")
    say("chat", "import:x", "-p", "hello", "--max-tokens", "2")
    say("verify", "import:x")


def test_key_of_an_import_is_stable(twin):
    steps = plan(*RL, f"imported.folder={twin('golden', random=False).folder}")
    assert steps["imported"].key == "mdymr4hx2qihgryagyec3jce7jz3mykuepkliun45rwkzyorovha"
