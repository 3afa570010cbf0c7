"""Startup cost of verbs: function calls and imports."""

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlxchat.store.manifest import write_manifest

HEAVY = (
    "hydra", "omegaconf", "yaml", "numpy", "mlx", "rich", "matplotlib", "pyarrow", "psutil", "safetensors", "tiktoken",
    "huggingface_hub", "jinja2",
)  # fmt: skip
STAGES = ("corpus", "tokenizer", "pretrain", "midtrain", "sft", "eval")
# Some 30 ms of Python, and half a second of it for a thousand artifacts.
CALLS = 60_000
CALLS_AN_ARTIFACT = {"ls": 700, "gc": 800, "plan": 1000, "lineage": 600}
# Runs each line of arguments on stdin in a fork, and prints its function calls and the heavy packages it imported.
WATCH = f"""
import cProfile, io, json, os, pstats, sys
from contextlib import redirect_stdout
from mlxchat.cli import main
import mlxchat.composition.compose
for line in sys.stdin:
    arguments = json.loads(line)
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    profile = cProfile.Profile()
    with redirect_stdout(io.StringIO()) as said:
        try:
            profile.runcall(main, arguments)
        except SystemExit as end:
            assert not end.code, said.getvalue()
    heavy = sorted(set({HEAVY!r}) & set(sys.modules))
    print(json.dumps([pstats.Stats(profile).total_calls, heavy, said.getvalue()]), flush=True)
    os._exit(0)
"""


def watch(*commands: list[str], cwd: Path) -> list[tuple[int, set[str], str]]:
    """Return calls, heavy packages and output of commands, each as a new process that has imported only the verbs."""
    lines = "".join(json.dumps(command) + "\n" for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", WATCH], cwd=cwd, input=lines, capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    return [(calls, set(heavy), said) for calls, heavy, said in found]


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
            "schema": 3, "key": "k" * 52, "rid": rid, "name": name, "stage": stage, "step": stage,
            "kind": "checkpoint", "version": 1,
            "config": {"seed": number, stage: settings}, "full_config": {stage: settings}, "excluded": {},
            "inputs": {"source": made} if number % len(STAGES) else {}, "tree": "0" * 64, "pins": {}, "externals": [],
            "outputs": [{"path": f"file_{index}", "bytes": 1000, "sha256": "0" * 64} for index in range(5)],
            "metrics": {"val_loss": 1.5}, "derived": {}, "seconds": 1.0, "published": f"2026-01-01T00:00:{number:06d}",
            "run": "run", "tokens_per_second": None, "peak_memory_bytes": None, "code": {}, "attempts": [],
        }  # fmt: skip
        folder = outputs / "store" / name
        folder.mkdir(parents=True)
        write_manifest(folder, manifest)
        made = {"step": stage, "artifact": name, "rid": rid, "tree": "0" * 64}
        names.append(name)
    return names


def test_reading_verbs_take_few_calls_and_light_imports(tmp_path):
    names, place = fill(tmp_path / "outputs", 12), f"outputs={tmp_path}/outputs"
    commands = [
        ["--version"], ["--help"], ["status", place], ["ls", place], ["show", names[3], place],
        ["lineage", names[3], place], ["diff", names[3], names[9], place], ["gc", place], ["pin", place],
        ["distill", "--help"], ["completion", "bash"],
    ]  # fmt: skip
    for command, (calls, heavy, _) in zip(commands, watch(*commands, cwd=tmp_path), strict=True):
        assert heavy == set(), command
        assert calls < CALLS * (2 if command == ["--help"] else 1), command  # which lists all options of all groups


def test_plan_and_finished_run_load_no_mlx(finished, outputs, tiny, tmp_path):
    for _, heavy, _ in watch(*([verb, *tiny, f"outputs={outputs}"] for verb in ("plan", "run")), cwd=tmp_path):
        assert heavy <= {"psutil", "hydra", "omegaconf", "yaml"}


def test_cost_per_artifact_is_small(tmp_path):
    counts: dict[str, list[int]] = {verb: [] for verb in CALLS_AN_ARTIFACT}
    for count in (50, 150):
        outputs = tmp_path / str(count)
        names = fill(outputs, count)
        commands = [[verb, *[names[5]] * (verb == "lineage"), f"outputs={outputs}"] for verb in counts]
        watch(*commands, cwd=tmp_path)  # makes the index
        for verb, (calls, _, _) in zip(counts, watch(*commands, cwd=tmp_path), strict=True):
            counts[verb].append(calls)
    assert {
        verb: (few, many) for verb, (few, many) in counts.items() if many - few > 100 * CALLS_AN_ARTIFACT[verb]
    } == {}
