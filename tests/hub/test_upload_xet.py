"""Uploads with Xet enabled to Hubs without Xet storage, or with storage that does not answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kit.hubs import UploadHub
from mlxchat.errors import PassingError
from mlxchat.hub import places

pytest.importorskip("hf_xet", reason="without hf_xet the official client uploads over plain HTTP")
# Raised by huggingface_hub for large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with UploadHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "README.md").write_text("# A model\n")
    return folder


def push(hub: UploadHub, folder: Path) -> None:
    places.push_folder(folder, "me/model", hub.token, message="a model", public=False)


def test_push_without_xet_storage_uses_http(hub: UploadHub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """hf_xet would request a token again and again, for minutes."""
    push(hub, folder)
    assert hub.repositories["me/model"].files["model.safetensors"] == bytes(range(256)) * 1000
    assert sum("xet-write-token" in path for _, path in hub.log) == 1
    assert f"note: {hub.url} has no Xet storage; files go over plain HTTP" in capsys.readouterr().err


def test_push_with_unreachable_xet_storage_uses_http(
    hub: UploadHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        place = f"http://127.0.0.1:{closed.getsockname()[1]}"
    hub.xet = {"accessToken": "token", "casUrl": place, "exp": 2**32}
    push(hub, folder)
    assert "model.safetensors" in hub.repositories["me/model"].files
    assert f"has Xet storage at {place}, which does not answer" in capsys.readouterr().err


def test_push_to_silent_xet_storage_ends(
    hub: UploadHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(places, "_find_xet_fault", lambda *_: "")
    monkeypatch.setattr(places, "_LEAST_SECONDS", 0.5)
    monkeypatch.setattr(places, "_LEAST_BYTES_PER_SECOND", 10**9)
    monkeypatch.setattr(places, "_LINE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hub.xet = {"accessToken": "token", "casUrl": place, "exp": 2**32}
        with pytest.raises(PassingError, match=r"Xet storage did not take 256\.0 kB within .*HF_HUB_DISABLE_XET=1"):
            push(hub, folder)
    assert "uploading 256.0 kB to me/model" in capsys.readouterr().err
    assert not hub.repositories["me/model"].commits


def test_aborted_session_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_xet raises KeyboardInterrupt if a session was aborted before its first upload."""
    aborted = threading.Event()
    monkeypatch.setattr("huggingface_hub.utils._xet.abort_xet_session", aborted.set)
    monkeypatch.setattr(places, "_find_xet_fault", lambda *_: "")
    monkeypatch.setattr(places, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(places, "_LINE_SECONDS", 0.01)

    def upload() -> None:
        with places._bounded(SimpleNamespace(endpoint=""), "me/model", "model", []):
            assert aborted.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(TimeoutError, match="Xet storage did not take"):
        upload()
