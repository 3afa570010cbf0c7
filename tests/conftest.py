"""What tests of several folders share: the command line in a process of its own, one finished tiny run, toy stages."""

from __future__ import annotations

import mlxchat  # isort: split

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import settings

from kit.models import make_tokenizer
from mlxchat.compose import compose_config
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.ops import blas
from mlxchat.ops.device import backend
from mlxchat.runner import stage as stage_module
from mlxchat.runner.environment import Environment
from mlxchat.runner.execute import Run, execute
from mlxchat.runner.plan import PlannedStep, make_plan
from mlxchat.runner.store import Store

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first

# Other programs may keep the machine busy: examples are the same every time and may take their time.
settings.register_profile("mlxchat", deadline=None, derandomize=True, database=None)
settings.load_profile("mlxchat")

_SHORT = """
    experiment=smoke machine=cpu machine.blas_threads=1
    model.aspect_ratio=16 model.head_width=16 model.context_tokens=256 tokenizer.vocab_size=300
    tokenizer.max_chars=20000
    pretrain.num_iterations=4 pretrain.batch.tokens=512 pretrain.eval_tokens=256 pretrain.sample_tokens=2
    pretrain.packing_buffer_documents=50
    midtrain.num_iterations=2 midtrain.batch.tokens=512 midtrain.eval_tokens=1024
    sft.num_iterations=2 sft.batch.tokens=512 sft.eval_tokens=1024
    rl.task.size=4 rl.evaluation.size=2 rl.num_iterations=2 rl.questions_per_iteration=2 rl.samples_per_question=2
    rl.max_new_tokens=8 rl.eval_samples=2
    eval.bpb_tokens=256 eval.max_new_tokens=4
"""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


def _clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "HYDRA", "PYTHON"))}


@pytest.fixture(autouse=True)
def same_cores() -> Iterator[None]:
    """Give matrix products the cores back that a training in this process may have taken from them."""
    before = blas.blas_threads()
    yield
    if before is not None:
        blas.set_blas_threads(before)


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    """Compute on the CPU, whatever device a test or the machine chose."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    backend.cache_clear()
    yield
    mx.set_default_device(before)
    backend.cache_clear()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of 280 ids."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that make the whole pipeline a matter of seconds."""
    config = compose_config(["experiment=smoke"]).config
    sizes = [f"suite.{name}.size=3" for name in config.suite]
    for name, stage in (("midtrain", config.midtrain), ("sft", config.sft)):
        sizes += [f"{name}.mixture.{task}.size=6" for task in stage.mixture]
        sizes += [f"{name}.validation.{task}.size=2" for task in stage.validation]
    return (*_SHORT.split(), *sizes)


@pytest.fixture(scope="session")
def mlxchat(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """Run `mlxchat` with arguments in a new process and an empty folder; takes cwd, environ and timeout."""

    def run(
        *arguments: str | Path, cwd: Path | None = None, environ: dict[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlxchat", *map(str, arguments)],
            cwd=cwd or tmp_path_factory.mktemp("cwd"), env=_clean_environment() | (environ or {}),
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def start_mlxchat(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Start `mlxchat` and return the process, which the test waits for."""

    def start(*arguments: str | Path, stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "mlxchat", *map(str, arguments)],
            cwd=tmp_path_factory.mktemp("cwd"), env=_clean_environment(),
            stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip

    return start


@dataclass(frozen=True)
class Finished:
    """A finished run: its outputs folder, which tests must not change, and what it printed."""

    outputs: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, mlxchat: CommandLine, tiny: tuple[str, ...]) -> Finished:
    """The whole pipeline, run once per session."""
    outputs = tmp_path_factory.mktemp("finished") / "outputs"
    done = mlxchat(*tiny, f"outputs={outputs}", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(outputs, done.stdout, done.stderr)


@pytest.fixture
def outputs(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished outputs that the test may change."""
    place = tmp_path / "outputs"
    shutil.copytree(finished.outputs, place, symlinks=True)
    return place


@dataclass
class ToySection:
    """Settings of a toy stage."""

    number: int = 1
    cadence: int = field(default=5, metadata={"identity": False})


@dataclass
class ToyConfig:
    """What the toy stages are configured with."""

    toy: ToySection = field(default_factory=ToySection)
    other: ToySection = field(default_factory=ToySection)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class Toys:
    """A folder of throw-away stages in place of stages/, and the runner on top of it."""

    package: Path
    outputs: Path
    config: ToyConfig = field(default_factory=ToyConfig)
    said: list[str] = field(default_factory=list)
    invocations: int = 0

    def add(
        self, name: str, body: str, *, inputs: dict[str, str] | None = None, config: tuple[str, ...] = ("toy",),
        outputs: tuple[str, ...] = ("result.txt",), produces: str = "thing", version: int = 1,
    ) -> None:  # fmt: skip
        """Write a stage whose `run(ctx)` is `body`, or write it anew."""
        self.package.joinpath(f"{name}.py").write_text(
            f"import os, signal, time\nfrom mlxchat.errors import DataError\nVERSION = {version}\n"
            f"CONFIG = {list(config)}\nINPUTS = {inputs or {}}\nPRODUCES = {produces!r}\nOUTPUTS = {list(outputs)}\n"
            f"def run(ctx):\n{indent(dedent(body).strip(), '    ')}\n"
        )
        stage_module.read_stage.cache_clear()
        sys.modules.pop(f"{self.package.name}.{name}", None)
        importlib.invalidate_caches()

    @property
    def store(self) -> Store:
        """The store as a new process sees it."""
        return Store(self.outputs)

    def plan(self, pipeline: dict[str, dict[str, str]], **options: Any) -> list[PlannedStep]:
        """Return the plan as a new process makes it."""
        options = {"targets": None, "seed": 1, "force": [], **options}
        return make_plan(self.config, pipeline, self.store, **options)

    def run(self, plan: list[PlannedStep], store: Store | None = None, **options: Any) -> Run:
        """Execute a plan as one invocation does; options are those of Run."""
        store = store or self.store
        store.prepare()
        self.invocations += 1
        folder = self.outputs / "runs" / f"run{self.invocations}"
        folder.mkdir()
        options = {"say": self.said.append, **options}
        run = Run(
            folder=folder, config=self.config, seed=1, force=[], overrides=["toy.number=1"],
            environment=Environment(lambda: {"name": "toy"}), **options,
        )  # fmt: skip
        execute(plan, store, run)
        return run


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toys]:
    """Toy stages: `make` writes toy.number, `copy` its input's result and other.number."""
    name = f"toys_{tmp_path.name}_{os.getpid()}"
    package = tmp_path / name
    package.mkdir()
    package.joinpath("__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stage_module, "_PACKAGE", name)
    monkeypatch.setattr(stage_module, "_folder", lambda: package)
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
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty Hub on this machine (tests/loopback_hub.py), used by this process and its children, with own caches."""
    from mlxchat.data.prefetch import stop_fetching
    from mlxchat.hub import downloads, listings

    spec = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).with_name("loopback_hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "loopback_hub", module)
    spec.loader.exec_module(module)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "FIRST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(listings, "FIRST_PAUSE_SECONDS", 0.002)
    listings.forget()
    with module.LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield server
        stop_fetching()
    listings.forget()


@pytest.fixture(scope="session")
def rows_sum_alike() -> bool:
    """Whether a row of a matrix product has the same bits whatever the other rows are.

    OpenBLAS's kernels for AVX-512 have this property. Those for AVX2 alone (Haswell, Zen) add up rows beyond a
    multiple of four in another order.
    """
    import mlxchat  # noqa: F401  (before MLX, so that the fast BLAS is loaded first)
    import mlx.core as mx  # isort: skip

    rows, matrix = (mx.random.normal(shape, key=mx.random.key(0)) for shape in ((8, 64), (64, 256)))
    return all(mx.array_equal(rows[:count] @ matrix, (rows @ matrix)[:count]).item() for count in (1, 2, 3))


@pytest.fixture(scope="session")
def ranks() -> Any:
    """Several processes in a ring: `ranks.run_ranks` and `ranks.lead_ranks` of tests/distributed/ranks.py."""
    path = Path(__file__).with_name("distributed") / "ranks.py"
    spec = importlib.util.spec_from_file_location("ranks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
