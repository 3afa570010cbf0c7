"""Startup cost of verbs: function calls and imports."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("hydra", "omegaconf", "yaml", "numpy", "mlx", "rich", "matplotlib", "pyarrow", "psutil")
STAGES = ("corpus", "tokenizer", "pretrain", "midtrain", "sft", "eval")
# Some 30 ms of Python, and a second of it for ten thousand artifacts.
CALLS, CALLS_OF_PLAN = 60_000, 400_000
CALLS_AN_ARTIFACT = {"ls": 150, "gc": 400, "plan": 1000, "lineage": 50}


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
            "config": {"seed": number, stage: settings}, "full_config": {stage: settings}, "excluded": {},
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
        "distill": ["distill", "--help"], "completion": ["completion", "bash"],
    }  # fmt: skip


VERBS = list(commands(Path(), [""] * 12))


def watch(*arguments: str, cwd: Path) -> tuple[int, set[str]]:
    """Run a command in a new process; return the function calls that it takes and the heavy packages it imports."""
    code = (
        "import cProfile, pstats, sys\nfrom mlxchat.cli import main\nprofile = cProfile.Profile()\n"
        "try:\n    profile.runcall(main, sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('watched', pstats.Stats(profile).total_calls, *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    mark, calls, *heavy = done.stdout.splitlines()[-1].split()
    assert mark == "watched", done.stdout
    return int(calls), set(heavy)


@pytest.mark.parametrize("verb", VERBS)
def test_reading_verbs_take_few_calls_and_light_imports(verb: str, small: Any, tmp_path: Path) -> None:
    calls, heavy = watch(*commands(*small)[verb], cwd=tmp_path)
    assert heavy == set()
    assert calls < CALLS


def test_cached_plan_imports_no_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXCHAT_COMPOSED_CACHE", "on")
    # Files of the checkout that were changed a moment ago keep a configuration from being kept.
    keep = "import mlxchat.composition.cache as cache; cache._SETTLED_SECONDS = -1e9\nfrom mlxchat.cli import main\n"
    subprocess.run([sys.executable, "-c", keep + "main(['plan'])"], cwd=tmp_path, check=True, capture_output=True)
    calls, heavy = watch("plan", cwd=tmp_path)
    assert heavy <= {"psutil"}, "memory is predicted"
    assert calls < CALLS_OF_PLAN


def test_cost_per_artifact_is_small(tmp_path: Path) -> None:
    counts: dict[str, list[int]] = {verb: [] for verb in CALLS_AN_ARTIFACT}
    for count in (200, 600):
        outputs = tmp_path / str(count)
        names = fill(outputs, count)
        for verb in counts:
            arguments = [verb, *[names[5]] * (verb == "lineage"), f"outputs={outputs}"]
            watch(*arguments, cwd=tmp_path)  # makes the index
            counts[verb].append(watch(*arguments, cwd=tmp_path)[0])
    assert {
        verb: (few, many) for verb, (few, many) in counts.items() if many - few > 400 * CALLS_AN_ARTIFACT[verb]
    } == {}
