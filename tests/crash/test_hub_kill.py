"""A run on a misbehaving Hub that is killed repeatedly ends with the artifacts of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kit.text import parquet

NAME = "org/texts"
FILES = 6
SETTINGS = (
    "experiment=smoke", "stage=pretrain", "machine=cpu", "machine.blas_threads=1", "machine.checkpoint_seconds=0",
    "corpus=hub", "corpus.packages=[]", f"corpus.hub.repository={NAME}", "corpus.hub.train_files=shard_*",
    "corpus.hub.validation_files=held_out.parquet", "tokenizer.max_chars=20000", "tokenizer.vocab_size=300",
    "model.aspect_ratio=16", "model.head_width=16", "model.context_tokens=128", "pretrain.num_iterations=30",
    "pretrain.batch.tokens=1024", "pretrain.eval_tokens=512", "pretrain.sample_tokens=2",
    "pretrain.packing_buffer_documents=20", "retry.seconds=0.2",
)  # fmt: skip


def texts(seed: int) -> list[str]:
    words = ["apple", "bread", "cloud", "door", "earth", "fire", "grass", "house", "island", "jar"]
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(5, 80))) for _ in range(60)]


def command(outputs: Path) -> list[str]:
    return [sys.executable, "-m", "mlxchat", *SETTINGS, f"outputs={outputs}"]


def environment(home: Path) -> dict[str, str]:
    return dict(os.environ) | {"HF_HOME": str(home / "hf"), "MLXCHAT_CACHE": str(home / "cache")}


def trees(outputs: Path) -> dict[str, str]:
    manifests = [json.loads(path.read_text()) for path in (outputs / "store").glob("*/manifest.json")]
    return {manifest["name"]: manifest["tree"] for manifest in manifests if manifest["stage"] != "tokens"}


@pytest.mark.slow
def test_run_on_the_hub_killed_at_random_gives_the_same_artifacts(hub: Any, tmp_path: Path) -> None:
    names = ["held_out.parquet", *(f"shard_{index}.parquet" for index in range(FILES))]
    content = {name: parquet(texts(seed), compression="none") for seed, name in enumerate(names)}
    hub.add(NAME, content)
    undisturbed, disturbed = tmp_path / "one", tmp_path / "two"
    done = subprocess.run(
        command(undisturbed / "outputs"), env=environment(undisturbed), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    hub.log.clear()
    hub.faults.truncate = hub.faults.corrupt = "shard_*"
    hub.faults.redirect, hub.faults.block_seconds = True, 0.4
    rng, kills = random.Random(1), 0
    for number in range(40):
        child = subprocess.Popen(
            command(disturbed / "outputs"),
            env=environment(disturbed),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        # Killed after so many further answers of the Hub, eight times at most; then nobody disturbs it.
        last = len(hub.log) + rng.randint(2, 12) if number < 8 else 1 << 30
        while child.poll() is None and len(hub.log) < last:
            time.sleep(0.01)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = child.communicate()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, errors.decode()
        hub.faults.block_seconds = max(0.0, hub.faults.block_seconds - 0.05)
    assert child.returncode == 0
    assert kills >= 2
    assert trees(disturbed / "outputs") == trees(undisturbed / "outputs")
    # Each file once, once more for the corrupted answer, and what a kill lost of the blocks that were on their way.
    whole = sum(map(len, content.values()))
    assert hub.sent("parquet") < 2 * whole + kills * 4 * 65_536
