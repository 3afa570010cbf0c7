"""The rehearsal of the speedrun from cold caches: every data set, mixture, stage and evaluation, also when killed.

It reads a loopback hub with nanochat's data sets, which stands beside some checkouts and not in them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxchat.store.manifest import read_manifest
from mlxchat.store.store import Store

HUB = Path(__file__).resolve().parents[3] / "shared" / "hub"
STEPS = ["corpus", "tokenizer", "pretrain", "midtrain", "sft", "rl", "eval_base", "eval_mid", "eval_sft", "eval_rl"]
CORE_TASKS = 22
LIMIT_SECONDS = 20 * 60

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HUB.is_dir(), reason="there is no loopback hub")]


@pytest.fixture(scope="module")
def hub_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port_file = tmp_path_factory.mktemp("hub") / "port"
    server = subprocess.Popen(
        [sys.executable, str(HUB / "serve.py"), "--port", "0", "--port-file", str(port_file)], stdout=subprocess.DEVNULL
    )
    try:
        while not port_file.exists() or not port_file.read_text():
            assert server.poll() is None, "the hub ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text().strip()}"
    finally:
        server.terminate()
        server.wait()


@dataclass
class Rehearsal:
    """A folder with outputs and caches of its own, and the command that fills them from the hub."""

    folder: Path
    url: str

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def start(self) -> subprocess.Popen[str]:
        identity, words = f"source.url={self.url}/files/identity_conversations.jsonl", "source.words=bundled"
        bees = ("midtrain.mixture.simple_spelling", "midtrain.mixture.spelling_bee", "suite.spelling_bee",
                "sft.mixture.simple_spelling", "sft.mixture.spelling_bee")  # fmt: skip
        arguments = [
            "experiment=speedrun_rehearsal", f"outputs={self.outputs}", "machine.checkpoint_seconds=1",
            "corpus.hub.validation_files=shard_00005.parquet",  # the hub has a few of the shards only
            f"eval.core.bundle={self.url}/files/eval_bundle.zip",
            *(f"+{stage}.mixture.identity.{identity}" for stage in ("midtrain", "sft")),
            *(f"+{place}.{words}" for place in bees),
        ]  # fmt: skip
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "HF_", "PYTHON"))}
        places = {"HF_HOME": str(self.folder / "hf"), "MLXCHAT_CACHE": str(self.folder / "cache")}
        return subprocess.Popen(
            [sys.executable, "-m", "mlxchat", *arguments], cwd=self.folder, text=True,
            env=clean | places | {"HF_ENDPOINT": self.url}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self) -> str:
        """Run it to its end; return what was printed."""
        process = self.start()
        text, _ = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, text
        return text

    def trees(self) -> dict[str, str]:
        """Return step → digest of its contents."""
        store = Store(self.outputs)
        found = {}
        for name in STEPS:
            folder = (self.outputs / "refs" / "latest" / name).resolve()
            manifest = read_manifest(folder)
            assert manifest is not None, name
            assert store.find(manifest["rid"]) == folder
            found[name] = manifest["tree"]
        return found

    def report(self) -> str:
        return max((self.outputs / "runs").glob("*/report.html")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, hub_url: str) -> tuple[Rehearsal, float]:
    """A rehearsal that nothing disturbed, and its seconds."""
    rehearsal, began = Rehearsal(tmp_path_factory.mktemp("undisturbed"), hub_url), time.monotonic()
    rehearsal.finish()
    return rehearsal, time.monotonic() - began


def test_it_takes_less_than_twenty_minutes_from_cold_caches(undisturbed: tuple[Rehearsal, float]) -> None:
    assert undisturbed[1] < LIMIT_SECONDS


def test_every_evaluation_of_the_speedrun_has_its_score(undisturbed: tuple[Rehearsal, float]) -> None:
    latest = undisturbed[0].outputs / "refs" / "latest"
    scores = {name: json.loads((latest / name / "scores.json").read_text()) for name in STEPS if name[:4] == "eval"}
    assert len(scores["eval_base"]["core"]["tasks"]) == CORE_TASKS
    assert scores["eval_base"]["bpb"]["val"] > 0
    for name in ("eval_mid", "eval_sft", "eval_rl"):
        assert scores[name]["chatcore"]["tasks"] == [
            "arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee"
        ], name  # fmt: skip


def test_its_report_has_a_section_for_every_step_and_every_score(undisturbed: tuple[Rehearsal, float]) -> None:
    page = undisturbed[0].report()
    for expected in (*STEPS, "CORE", "ChatCORE", "hellaswag_zeroshot", "bigbench_language_identification", "humaneval"):
        assert expected in page, expected
    assert "http://" not in page.replace("http://www.w3.org", "").replace(undisturbed[0].url, "")


def test_a_second_time_nothing_is_computed_or_fetched(undisturbed: tuple[Rehearsal, float]) -> None:
    assert "10 done" in undisturbed[0].finish()


def test_killed_ten_times_on_the_way_it_ends_with_the_same_artifacts(
    undisturbed: tuple[Rehearsal, float], tmp_path: Path, hub_url: str
) -> None:
    rng, killed = random.Random(17), Rehearsal(tmp_path, hub_url)
    for number in range(10):
        process = killed.start()
        try:
            process.communicate(timeout=rng.uniform(0.03, 0.11) * undisturbed[1])
            pytest.fail(f"it was done before it was killed for the {number + 1}th time")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    killed.finish()
    assert killed.trees() == undisturbed[0].trees()
