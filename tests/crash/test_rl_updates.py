"""RL with several updates per rollout, a divergence and further questions: ended anywhere, it ends with the same bytes.

Where a rollout has several updates, the answers, their log-probabilities and the place in the questions are state.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.store.files import Records
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

# RL needs a model that is now and then right: it picks letters.
SETTINGS = """
    machine.checkpoint_seconds=0 pretrain.num_iterations=60 midtrain.num_iterations=60
    sft.mixture.facts_mc.size=60 sft.num_iterations=80 sft.schedule.init_lr_frac=1
    rl=dapo rl.kl_coefficient=0.05 rl.minibatches_per_rollout=2 rl.passes_per_rollout=2 rl.resample_rounds=3
    rl.task.task=facts_mc rl.task.size=30 rl.evaluation.task=facts_mc rl.num_iterations=12 rl.train_unfinished=true
    rl.questions_per_iteration=4 rl.samples_per_question=4 rl.max_new_tokens=3 rl.top_k=4
"""
UPDATES = 12 * 4
OBSERVED = ("tokens_per_second", "mfu", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes")
# As random as the seed: the number of the first update after which it is ended, and the delay until then.
SHORT = {3: 2}
LONG = {11: 12, 12: 12}


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> list[str]:
    """The tiny settings, in which SFT practises nothing but to answer with a letter."""
    other = [item for item in tiny if item.startswith("sft.mixture.") and ".facts_mc." not in item]
    mine = {item.partition("=")[0] for item in SETTINGS.split()}
    kept = [item for item in tiny if item not in other and item.partition("=")[0] not in mine]
    rl = compose_config(["experiment=smoke"]).config.rl
    removed = [item.partition(".size=")[0] for item in other]
    removed += [f"rl.{name}.options.{key}" for name in ("task", "evaluation") for key in getattr(rl, name).options]
    return [*kept, *(f"~{key}" for key in removed), *SETTINGS.split()]


@pytest.fixture(scope="module")
def finetuned(settings: list[str], mlxchat: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs in which all before RL is done."""
    outputs: Path = tmp_path_factory.mktemp("finetuned") / "outputs"
    done = mlxchat(*settings, "stage=sft", f"outputs={outputs}", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], finetuned: Path, mlxchat: Callable[..., Any]) -> Path:
    """RL to which nothing happens."""
    outputs = finetuned.with_name("undisturbed")
    shutil.copytree(finetuned, outputs, symlinks=True)
    done = mlxchat(*settings, "stage=rl", f"outputs={outputs}", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return refs_of(Store(outputs))["rl"]


def end_at(process: subprocess.Popen[str], outputs: Path, update: int, delay: float, number: int) -> None:
    """Send the signal a while after RL's metrics have come to the update."""
    while process.poll() is None:
        for log in (outputs / "work").glob("*/ckpt/records/metrics.jsonl"):
            records = Records(log).read()
            if records and records[-1].get("iteration", 0) >= update:
                time.sleep(delay)
                process.send_signal(number)
                return
        time.sleep(0.005)


def records(place: Path) -> list[dict[str, Any]]:
    """Return the metrics without times."""
    lines = (place / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in OBSERVED} for line in lines]


def disturb(
    seed: int, ends: int, settings: list[str], outputs: Path, start_mlxchat: Callable[..., Any]
) -> tuple[Path, set[str]]:
    """End RL so often, start it again each time, and let it finish; return the artifact, and how attempts ended."""
    draw = random.Random(seed)
    for update in sorted(draw.randrange(UPDATES - 2) for _ in range(ends)):
        process = start_mlxchat(*settings, "stage=rl", f"outputs={outputs}")
        end_at(process, outputs, update, 0.05 * draw.random(), draw.choice([signal.SIGKILL, signal.SIGTERM]))
        text, _ = process.communicate(timeout=200)
        assert process.returncode in (0, -9, -15, 143), text  # -15: while Python was starting
        assert "Traceback" not in text
    process = start_mlxchat(*settings, "stage=rl", f"outputs={outputs}")
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    place = refs_of(Store(outputs))["rl"]
    attempts = json.loads((place / "manifest.json").read_text())["attempts"]
    return place, {attempt["outcome"] for attempt in attempts}


def test_it_has_several_updates_further_questions_and_a_divergence(undisturbed: Path) -> None:
    # Otherwise equal bytes would prove nothing.
    logged = records(undisturbed)
    assert sorted({record["iteration"] for record in logged if "kl" in record}) == list(range(1, UPDATES + 1))
    assert max(record["kl"] for record in logged if "kl" in record) > 0
    assert any(record["ratio"] != 1 for record in logged if "ratio" in record)
    asked = [record["questions_asked"] for record in logged if "questions_asked" in record]
    assert len(asked) == 12
    assert len(set(asked)) > 1


def compare(
    seed: int, ends: int, settings: list[str], finetuned: Path, undisturbed: Path, start: Callable[..., Any], to: Path
) -> set[str]:
    """Disturb a copy of what was fine-tuned, and compare; return how attempts ended."""
    shutil.copytree(finetuned, to, symlinks=True)
    place, outcomes = disturb(seed, ends, settings, to, start)
    assert (place / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert records(place) == records(undisturbed)
    assert (place / "rollouts.jsonl").read_bytes() == (undisturbed / "rollouts.jsonl").read_bytes()
    return outcomes


@pytest.mark.parametrize("seed", SHORT)
def test_ended_at_random_it_ends_with_the_same_bytes(
    seed: int, settings: list[str], finetuned: Path, undisturbed: Path, start_mlxchat: Any, tmp_path: Path
) -> None:
    ends = SHORT[seed]
    outcomes = compare(seed, ends, settings, finetuned, undisturbed, start_mlxchat, tmp_path / "outputs")
    assert outcomes > {"done"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", LONG)
def test_ended_at_random_many_times_it_ends_with_the_same_bytes(
    seed: int, settings: list[str], finetuned: Path, undisturbed: Path, start_mlxchat: Any, tmp_path: Path
) -> None:
    compare(seed, LONG[seed], settings, finetuned, undisturbed, start_mlxchat, tmp_path / "outputs")


FAILING = """
from pathlib import Path

def own(conversation, answer):
    with open("calls", "a") as calls:
        calls.write(".")
        if calls.tell() > 150 and not Path("mended").exists():
            raise ConnectionError("the judge is away")
    return 0.1 * len(answer)
"""


def test_a_reward_function_that_fails_for_a_while_costs_no_iteration(
    settings: list[str], finetuned: Path, mlxchat: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(finetuned, tmp_path / "outputs", symlinks=True)
    (tmp_path / "judging_from_afar.py").write_text(FAILING)
    own = '{right: {kind: exact}, own: {kind: function, function: "judging_from_afar:own"}}'
    command = [*settings, f"+rl.rewards={own}", "stage=rl", "machine.checkpoint_seconds=1000", "outputs=outputs"]
    failed = mlxchat(*command, cwd=tmp_path, timeout=200)
    said = failed.stdout + failed.stderr
    assert failed.returncode == 1, said
    assert "judging_from_afar:own raised ConnectionError: the judge is away (judging_from_afar.py, line 8)" in said
    assert "The state after iteration " in said
    assert "Traceback" not in said
    (tmp_path / "mended").touch()
    mended = mlxchat(*command, cwd=tmp_path, timeout=200)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    place = refs_of(Store(tmp_path / "outputs"))["rl"]
    failing, last = json.loads((place / "manifest.json").read_text())["attempts"]
    assert failing["outcome"] == "failed"
    assert last["resumed_from"] > 0
    iterations = [record["iteration"] for record in records(place) if "policy_loss" in record]
    assert iterations == list(range(1, UPDATES + 1))
