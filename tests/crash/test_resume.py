"""A training that is killed or stopped anywhere ends with the same bits as an undisturbed one."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mlxchat.composition.compose import compose_config
from mlxchat.store.files import Records
from mlxchat.store.fingerprint import hash_file
from mlxchat.store.manifest import OBSERVATIONS
from mlxchat.store.store import Store

# RL needs a model that is now and then right: it picks letters. Each of its rollouts has four updates.
SETTINGS = """
    stage=rl machine.checkpoint_seconds=0
    pretrain.num_iterations=30 pretrain.eval_every=10 architecture.dropout=0.1
    midtrain.num_iterations=30 midtrain.eval_every=12
    midtrain.adapter.kind=dora midtrain.adapter.bits=4 midtrain.adapter.group_size=32 midtrain.adapter.dropout=0.1
    sft.mixture.kinds_mc.size=60 sft.num_iterations=40 sft.schedule.init_lr_frac=1 sft.eval_every=30
    rl=dapo rl.kl_coefficient=0.05 rl.minibatches_per_rollout=2 rl.passes_per_rollout=2 rl.resample_rounds=3
    rl.task.task=kinds_mc rl.task.size=30 rl.evaluation.task=kinds_mc rl.num_iterations=4 rl.train_unfinished=true
    rl.questions_per_iteration=4 rl.samples_per_question=4 rl.max_new_tokens=3 rl.top_k=4
    rl.adapter.kind=lora rl.adapter.rank=2
"""
TRAININGS = ("pretrain", "midtrain", "sft", "rl")
UPDATES = 4 * 4
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
ENDS = (("pretrain", 10, TERM), ("rl", 7, KILL))
MORE_ENDS = (
    ("pretrain", 5, KILL), ("pretrain", 15, TERM), ("midtrain", 3, TERM), ("midtrain", 20, KILL), ("sft", 10, KILL),
    ("sft", 30, TERM), ("rl", 2, KILL), ("rl", 4, TERM), ("rl", 7, INT), ("rl", 10, KILL), ("rl", 13, KILL),
)  # fmt: skip
OBSERVED = ("tokens_per_second", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes")


@dataclass
class Story:
    """Exit codes and output of the invocations on one outputs folder, in order."""

    outputs: Path
    ends: tuple[tuple[str, int, signal.Signals], ...] = ()
    codes: list[int] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def manifest(self, step: str) -> dict[str, Any]:
        (found,) = (manifest for manifest in Store(self.outputs).manifests() if manifest["step"] == step)
        return found

    def file(self, step: str, name: str) -> Path:
        return self.outputs / "store" / self.manifest(step)["name"] / name

    def records(self, step: str) -> list[dict[str, Any]]:
        """Return a training's metrics without what depends on time."""
        lines = self.file(step, "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in OBSERVED} for line in lines]


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> list[str]:
    """The tiny settings, in which SFT trains only on answers that are a letter."""
    other = [item for item in tiny if item.startswith("sft.mixture.") and ".kinds_mc." not in item]
    mine = {item.partition("=")[0] for item in SETTINGS.split()}
    kept = [item for item in tiny if item not in other and item.partition("=")[0] not in mine]
    rl = compose_config(["experiment=smoke"]).config.rl
    removed = [item.partition(".size=")[0] for item in other]
    removed += [f"rl.{name}.options.{key}" for name in ("task", "evaluation") for key in getattr(rl, name).options]
    return [*kept, *(f"~{key}" for key in removed), *SETTINGS.split()]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], mlxchat: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A run that nothing happened to."""
    story = Story(tmp_path_factory.mktemp("undisturbed") / "outputs")
    done = mlxchat(*settings, f"outputs={story.outputs}")
    assert done.returncode == 0, done.stdout + done.stderr
    return story


@pytest.fixture(
    scope="module",
    params=[pytest.param(ENDS, id="twice"), pytest.param(MORE_ENDS, id="eleven times", marks=pytest.mark.slow)],
)
def disturbed(
    request: pytest.FixtureRequest, settings: list[str], start_mlxchat: Any, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    """The same, killed or stopped during trainings, and each time started again."""
    story = Story(tmp_path_factory.mktemp("disturbed") / "outputs", request.param)
    for step, iteration, number in (*story.ends, (None, None, None)):
        process = start_mlxchat(*settings, f"outputs={story.outputs}")
        if step is not None:
            wait_for(process, story.outputs, step, iteration)
            process.send_signal(number)
        text, _ = process.communicate(timeout=600)
        story.codes.append(process.returncode)
        story.printed.append(text)
    return story


def wait_for(process: subprocess.Popen[str], outputs: Path, step: str, iteration: int) -> None:
    """Return once the step's metrics reach the iteration; the process is still in that step."""
    while process.poll() is None:
        for log in (outputs / "work").glob("*/ckpt/records/metrics.jsonl"):
            try:
                records = Records(log).read()
                attempts = Records(log.parents[2] / "attempts.jsonl").read()
            except FileNotFoundError:  # the step before is published meanwhile
                continue
            if attempts and attempts[0].get("step") == step and records and records[-1]["iteration"] >= iteration:
                return
        time.sleep(0.005)
    pytest.fail(f"ended before iteration {iteration} of {step}: {process.communicate()[0]}")


def test_settings_exercise_the_state(undisturbed):
    """Otherwise equal bytes would prove nothing."""
    name = "model.safetensors"
    assert hash_file(undisturbed.file("sft", name)) != hash_file(undisturbed.file("pretrain", name))
    for step in ("midtrain", "rl"):
        arrays = load_file(undisturbed.file(step, "adapters.safetensors"))
        assert all(value.any() for name, value in arrays.items() if name.endswith("lora_b"))
    logged = undisturbed.records("rl")
    assert sorted({record["iteration"] for record in logged if "kl" in record}) == list(range(1, UPDATES + 1))
    assert max(record["kl"] for record in logged if "kl" in record) > 0
    assert any(record["ratio"] != 1 for record in logged if "ratio" in record)
    assert len({record["questions_asked"] for record in logged if "questions_asked" in record}) > 1


def test_exit_codes_and_output_name_the_stop_and_the_resume(disturbed):
    expected = [-number if number == KILL else 128 + number for _, _, number in disturbed.ends]
    assert disturbed.codes == [*expected, 0], disturbed.printed
    for printed, following, (step, _, number) in zip(
        disturbed.printed, disturbed.printed[1:], disturbed.ends, strict=False
    ):
        assert "Traceback" not in printed
        if number != KILL:
            assert f"{step} stopped: saved at iteration " in printed
            assert ". The same command continues from there." in printed
        (line,) = (line for line in following.splitlines() if line.startswith(f"{step} ") and " run " in line)
        assert line.endswith("missing, resumes")


@pytest.mark.parametrize("step", TRAININGS)
def test_resumed_training_is_bit_exact(step, disturbed, undisturbed):
    ours, theirs = disturbed.manifest(step), undisturbed.manifest(step)
    assert ours["tree"] == theirs["tree"]
    assert list((disturbed.outputs / "work").iterdir()) == []
    assert [
        file for file in theirs["outputs"] if file["path"] not in OBSERVATIONS and file not in ours["outputs"]
    ] == []
    assert (ours["metrics"], ours["derived"]) == (theirs["metrics"], theirs["derived"])
    assert disturbed.records(step) == undisturbed.records(step)
    if step == "rl":
        assert (
            disturbed.file(step, "rollouts.jsonl").read_bytes() == undisturbed.file(step, "rollouts.jsonl").read_bytes()
        )
    else:
        losses = [record["iteration"] for record in disturbed.records(step) if "loss" in record]
        assert losses == list(range(1, len(losses) + 1))


@pytest.mark.parametrize("step", TRAININGS)
def test_manifest_lists_every_attempt_and_where_it_resumed(step, disturbed):
    numbers = [number for each, _, number in disturbed.ends if each == step]
    attempts = disturbed.manifest(step)["attempts"]
    outcomes = [*("killed" if number == KILL else "interrupted" for number in numbers), "done"]
    assert [attempt["outcome"] for attempt in attempts] == outcomes
    # A killed attempt cannot record where it began.
    starts = [attempt["resumed_from"] for attempt in attempts if attempt["outcome"] != "killed"]
    if outcomes[0] != "killed":
        assert starts.pop(0) is None
    assert starts == sorted(starts)
    assert min(starts, default=1) > 0
