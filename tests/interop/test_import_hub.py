"""Models of the Hub: verified downloads, identity by contents, and third-party models in mlx-lm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import ConfigError, DataError
from mlxchat.hub import client
from mlxchat.interop.importing import import_model, model_sizes, pins_of
from mlxchat.interop.source import outside_folder
from mlxchat.store.fingerprint import hash_file

Twin = Any
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
