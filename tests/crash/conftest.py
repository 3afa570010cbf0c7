"""The pipeline of stubs in separate processes, and what must hold of an outputs folder after any crash."""

import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from crash import stub_run
from mlxchat.store import locks
from mlxchat.store.files import Records
from mlxchat.store.manifest import find_damage, read_manifest
from mlxchat.store.naming import links, refs_of, resolve, runs
from mlxchat.store.store import SAVED, Store


def check_whole(outputs: Path) -> None:
    """What must hold at any moment: what the store shows is whole, and no lock is held by the dead."""
    for folder in (outputs / "store").glob("*"):
        assert list(find_damage(folder, read_manifest(folder))) == []
    for lock in (outputs / "locks").glob("*"):
        assert not locks.is_held(lock), lock


@dataclass
class Stubs:
    """One folder with outputs/ in it, on which the stubs' pipeline runs."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the pipeline; variables are given without MLXCHAT_CRASH_ before their names.

        The process is a fork of this one, which saves a second of imports; a fresh one on a Mac, whose libraries do not
        work in forks.
        """
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "PYTHON"))}
        wanted = {(f"MLXCHAT_CRASH_{key}" if key.isupper() else key.upper()): text for key, text in environment.items()}
        from_scratch = sys.platform == "darwin"
        fork = partial(stub_run.run_forked, self.outputs, list(arguments), clean | wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks: other threads of this process do not matter
            process = subprocess.Popen(
                [sys.executable, stub_run.__file__, str(self.outputs), *arguments],
                cwd=self.folder, env=clean | wanted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                preexec_fn=None if from_scratch else fork, restore_signals=from_scratch,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run the pipeline to its end; return exit code and what was printed."""
        process = self.start(*arguments, **environment)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text

    def trace(self, *arguments: str) -> list[str]:
        """Run the pipeline undisturbed and return the crash points that were passed, in order."""
        file = self.folder / "trace.txt"
        code, text = self.run(*arguments, TRACE=str(file))
        assert code == 0, text
        return file.read_text().splitlines()

    def trees(self) -> dict[str, str]:
        """Return step, also STEP@N → digest of the artifact that its name leads to in the latest run."""
        store = Store(self.outputs)
        steps = refs_of(store)
        saved = {name for run in runs(store) for name in links(store, run) if name.partition(SAVED)[0] in steps}
        return {name: read_manifest(resolve(store, name))["tree"] for name in {*steps, *saved}}

    def executions(self) -> Counter[str]:
        """Return step → how often its stage was run."""
        return Counter((self.folder / "executions.txt").read_text().split())

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the events of this kind of all runs."""
        logs = sorted((self.outputs / "runs").glob("*/events.jsonl"))
        return [record for log in logs for record in Records(log).read() if record["event"] == event]

    def check_whole(self) -> None:
        check_whole(self.outputs)

    def check_clean(self) -> None:
        """What must hold after a run that succeeded: it is whole, and nothing is left of what happened before."""
        self.check_whole()
        assert list((self.outputs / "work").iterdir()) == []
        hidden = [path for path in self.outputs.rglob("*") if path.name.startswith(".")]
        assert hidden == []

    def copy(self, folder: Path) -> "Stubs":
        """Return a copy, outputs included."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return Stubs(folder)

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Stubs]:
    (tmp_path / "stubs").mkdir()
    made = Stubs(tmp_path / "stubs")
    yield made
    made.end()


@pytest.fixture(scope="module")
def make_stubs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Stubs]:
    """Return a function that makes empty folders for the stubs' pipeline."""
    return lambda: Stubs(tmp_path_factory.mktemp("stubs"))
