"""What tests of several folders share: the command line in a process of its own, one finished tiny run, toy stages."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hypothesis import settings

from kit.commands import Command, CommandLine, Finished, Say, run_here, run_process, start_process, tiny_settings
from kit.hubs import LoopbackHub
from kit.models import computing_on_cpu, make_model, make_tokenizer
from kit.toys import Toys
from mlxchat.composition import compose
from mlxchat.cpu import runtime
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.model.gpt import GPT
from mlxchat.runner import stage as stage_module

# Other programs may keep the machine busy: examples are the same every time and may take their time.
settings.register_profile("mlxchat", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("mlxchat")

# No test uses the network, also where there is one; fixtures with a hub of their own allow it. huggingface_hub reads
# the variable when it is imported, which must not be what those fixtures find.
huggingface_hub.constants.HF_HUB_OFFLINE = False
os.environ["HF_HUB_OFFLINE"] = "1"
# Under nohup it is ignored, which child processes inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(autouse=True)
def same_cores() -> Iterator[None]:
    """Compute on the CPU; give matrix products the cores back that a training here may have taken from them."""
    before = runtime.blas_threads()
    with computing_on_cpu():
        yield
    if before is not None:
        runtime.set_blas_threads(before)


@pytest.fixture(params=["cpu", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether `mlxchat.cpu` computes or the plain path, which Metal and CUDA run, on this machine's CPU."""
    if request.param == "plain":
        monkeypatch.setenv("MLXCHAT_CPU", "plain")
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Compose equal overrides of the built-in files once: Hydra takes a third of a second."""
    known: dict[Any, Any] = {}
    plain = compose._compose

    def remember(overrides: list[str], folders: list[str], primary: Path | None, schema: type) -> Any:
        if primary is not None or folders:
            return plain(overrides, folders, primary, schema)
        if (key := (tuple(overrides), schema)) not in known:
            known[key] = plain(overrides, folders, primary, schema)
        return deepcopy(known[key])

    compose._compose = remember
    yield
    compose._compose = plain


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of 280 ids."""
    return make_tokenizer()


@pytest.fixture
def model() -> GPT:
    """A small random model."""
    return make_model(num_layers=3, scale=0.3)


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that make the whole pipeline a matter of seconds."""
    return tiny_settings()


@pytest.fixture(scope="session")
def mlxchat(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """Run `mlxchat` with arguments in a new process and an empty folder; takes cwd, environ and timeout."""

    def run(*arguments: str | Path, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_process(*arguments, cwd=cwd or tmp_path_factory.mktemp("cwd"), **options)

    return run


@pytest.fixture(scope="session")
def start_mlxchat(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Start `mlxchat` in an empty folder and return the process, which the test waits for."""
    return lambda *arguments, **options: start_process(*arguments, cwd=tmp_path_factory.mktemp("cwd"), **options)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `mlxchat` with arguments in this process; return its exit code and all that it printed."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        code = run_here(*arguments)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def say(command: Command) -> Say:
    """Run `mlxchat` with arguments in this process, which ends with this code; return all that it printed."""

    def run(*arguments: str | Path, code: int = 0) -> str:
        ended, printed = command(*arguments)
        assert ended == code, printed
        return printed

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, mlxchat: CommandLine, tiny: tuple[str, ...]) -> Finished:
    """The whole pipeline, run once by the first of pytest's workers that needs it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = folder / "printed.json"
        if not printed.exists():
            done = mlxchat(*tiny, f"outputs={folder}/outputs", timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.write_text(json.dumps([done.stdout, done.stderr]))
    return Finished(folder / "outputs", *json.loads(printed.read_text()))


@pytest.fixture
def outputs(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished outputs that the test may change."""
    return shutil.copytree(finished.outputs, tmp_path / "outputs", symlinks=True)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toys]:
    """Toy stages: `make` writes toy.number, `copy` its input's result and other.number."""
    name = f"toys_{tmp_path.name}_{os.getpid()}"
    package = tmp_path / name
    package.mkdir()
    package.joinpath("__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stage_module, "_PACKAGE", name)
    monkeypatch.setattr(stage_module, "_FOLDER", package)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = Toys(package, tmp_path / "outputs")
    found.add("make", "(ctx.out / 'result.txt').write_text(str(ctx.config.toy.number))")
    found.add(
        "copy",
        """
        text = (ctx.inputs["source"] / "result.txt").read_text()
        (ctx.out / "result.txt").write_text(f"{text} {ctx.config.other.number}")
        """,
        inputs={"source": "thing"},
        config=("other",),
    )
    yield found
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]
    stage_module.read_stage.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub on this machine used by this process and its children, with own caches; it takes uploads."""
    from mlxchat.hub import client

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "FIRST_PAUSE_SECONDS", 0.002)
    client.forget()
    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield server
        for thread in threading.enumerate():  # downloads ahead of what was read
            if thread.name == "fetch":
                thread.join(30)
    client.forget()


@pytest.fixture
def upload_hub(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The same, which requires a token."""
    hub.token = "hf_right_token"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; without it or playwright the test is left out."""
    playwright = pytest.importorskip("playwright.sync_api")
    places = [place for name in BROWSERS if (place := shutil.which(name))]
    if not places:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=places[0], args=["--no-sandbox"])
        yield opened
        opened.close()
