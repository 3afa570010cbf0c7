"""How soon verbs answer, against a bare interpreter on the same machine at the same time, and what they import."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("hydra", "omegaconf", "yaml", "numpy", "mlx", "rich", "matplotlib", "pyarrow", "psutil")
STAGES = ("corpus", "tokenizer", "pretrain", "midtrain", "sft", "eval")
# A bare start takes 15 to 20 ms where this was written, so 80 ms are four to five of it.
STATUS_STARTS, PLAN_STARTS, STORE_STARTS = 5.0, 20.0, 50.0


def fill(outputs: Path, count: int) -> list[str]:
    """Write so many artifacts of 6 kB each without their files; return their names."""
    settings = {f"key_{number}": number * 0.5 for number in range(120)}
    names: list[str] = []
    made: dict[str, Any] = {}
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        rid = base64.b32encode(hashlib.sha256(str(number).encode()).digest()).decode().rstrip("=").lower()
        name = f"{stage}-d4-{rid[:16]}"
        manifest = {
            "schema": 1, "rid": rid, "name": name, "stage": stage, "step": stage, "kind": "checkpoint", "version": 1,
            "config": {"seed": number, stage: settings}, "full_config": settings, "excluded": {},
            "inputs": {"source": made} if number % len(STAGES) else {}, "tree": "0" * 64, "pins": {}, "externals": [],
            "outputs": [{"path": f"file_{index}", "bytes": 1000, "sha256": "0" * 64} for index in range(5)],
            "metrics": {"val_loss": 1.5}, "derived": {}, "seconds": 1.0, "published": f"2026-01-01T00:00:{number:06d}",
            "run": "run", "tokens_per_second": None, "peak_memory_bytes": None, "code": {}, "attempts": [],
        }  # fmt: skip
        folder = outputs / "store" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        made = {"step": stage, "artifact": name, "rid": rid, "tree": "0" * 64}
        names.append(name)
    return names


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    outputs = tmp_path_factory.mktemp("small") / "outputs"
    return outputs, fill(outputs, 12)


def commands(outputs: Path, names: list[str]) -> dict[str, list[str]]:
    place = f"outputs={outputs}"
    return {
        "--version": ["--version"], "status": ["status", place], "ls": ["ls", place], "show": ["show", names[3], place],
        "lineage": ["lineage", names[3], place], "diff": ["diff", names[3], names[9], place],
        "verify": ["verify", names[3], place], "gc": ["gc", place], "pin": ["pin", place],
        "distill": ["distill", "--help"], "_complete": ["_complete", "mlxchat show p"],
    }  # fmt: skip


VERBS = list(commands(Path(), [""] * 12))


def seconds(*arguments: str, cwd: Path) -> float:
    """Return how long a process takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, check=False, env={**os.environ})
    return time.perf_counter() - began


def starts(*arguments: str, cwd: Path, rounds: int = 5) -> float:
    """Return how many bare starts of the interpreter a command takes: the best of several rounds, in alternation."""
    times = [(seconds("-c", "pass", cwd=cwd), seconds("-m", "mlxchat", *arguments, cwd=cwd)) for _ in range(rounds)]
    return min(took for _, took in times) / min(bare for bare, _ in times)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_only_reads_takes_few_bare_starts(verb: str, small: Any, tmp_path: Path) -> None:
    assert starts(*commands(*small)[verb], cwd=tmp_path) < STATUS_STARTS


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_only_reads_imports_nothing_heavy(verb: str, small: Any, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mlxchat.cli import main\n"
        f"try:\n    main({commands(*small)[verb]!r})\nexcept SystemExit:\n    pass\n"
        f"print('heavy:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stdout


def test_a_plan_whose_configuration_was_composed_before_imports_no_hydra_and_starts_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXCHAT_COMPOSED_CACHE", "on")
    # Files of the checkout that were changed a moment ago keep a configuration from being kept.
    keep = "import mlxchat.composed_cache as cache; cache._SETTLED_SECONDS = -1e9\nfrom mlxchat.cli import main\n"
    subprocess.run([sys.executable, "-c", keep + "main(['plan'])"], cwd=tmp_path, check=True, capture_output=True)
    code = "import sys\nfrom mlxchat.cli import main\ntry:\n    main(['plan'])\nexcept SystemExit:\n    pass\n"
    code += f"print('heavy:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()[1:]) <= {"psutil"}, "memory is predicted"
    assert starts("plan", cwd=tmp_path) < PLAN_STARTS


def test_ten_thousand_artifacts_are_listed_planned_with_and_looked_through_in_a_second(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    names = fill(outputs, 10_000)
    subprocess.run([sys.executable, "-m", "mlxchat", "ls", f"outputs={outputs}"], check=True, capture_output=True)
    place = f"outputs={outputs}"
    for arguments in (["ls", place], ["gc", place], ["plan", place], ["lineage", names[5], place]):
        assert starts(*arguments, cwd=tmp_path, rounds=3) < STORE_STARTS, arguments
