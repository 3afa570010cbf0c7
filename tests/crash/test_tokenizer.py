"""A stopped or killed tokenizer training leaves nothing, and the next one gives the same bytes."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from kit.commands import MLXCHAT

# Large enough that a signal comes while it trains.
SETTINGS = (
    "experiment=smoke", "machine=cpu", "corpus=files", "tokenizer.vocab_size=9000", "tokenizer.max_chars=9000000",
    "stage=tokenizer",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(60_000)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = ('{"text": "' + " ".join(rng.choices(words, k=1000)) + '"}' for _ in range(1500))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def start(outputs: Path, text: Path) -> subprocess.Popen[str]:
    """Start a run and return once its tokenizer is being trained."""
    process = subprocess.Popen(
        [*MLXCHAT, *SETTINGS, f"corpus.paths=[{text}]", f"outputs={outputs}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tokenizer  starts"):
            break
    while process.poll() is None and not psutil.Process(process.pid).children():
        time.sleep(0.01)
    return process


def artifact(outputs: Path) -> dict[str, bytes] | None:
    """Return the files of the tokenizer; compression.json depends on what is installed, the manifest on the time."""
    found = list((outputs / "store").glob("tokenizer-*"))
    if not found:
        return None
    return {path.name: path.read_bytes() for path in found[0].iterdir() if path.name != "manifest.json"}


@pytest.mark.slow
def test_stopped_tokenizer_training_leaves_nothing_and_is_repeatable(text: Path, tmp_path: Path) -> None:
    straight = start(tmp_path / "straight", text)
    straight.communicate()
    assert straight.returncode == 0
    expected = artifact(tmp_path / "straight")
    assert expected is not None
    outputs = tmp_path / "stopped"
    for number in (signal.SIGINT, signal.SIGKILL):
        process = start(outputs, text)
        workers = psutil.Process(process.pid).children()
        assert workers
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        said, _ = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -9), said
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert alive == []
        assert artifact(outputs) is None
    last = start(outputs, text)
    last.communicate()
    assert (last.returncode, artifact(outputs)) == (0, expected)
