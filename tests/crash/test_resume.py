"""A training that is killed or stopped, anywhere, ends as if nothing had happened: bit for bit."""

from __future__ import annotations

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

# Long enough to be stopped halfway. RL needs a model that is now and then right: it picks letters.
SETTINGS = """
    stage=rl machine.checkpoint_seconds=0
    pretrain.num_iterations=60 pretrain.eval_every=20 architecture.dropout=0.1 pretrain.keep=best pretrain.keep_every=7
    midtrain.num_iterations=60 midtrain.eval_every=25
    sft.mixture.facts_mc.size=60 sft.num_iterations=80 sft.schedule.init_lr_frac=1 sft.eval_every=50
    rl.task.task=facts_mc rl.task.size=30 rl.evaluation.task=facts_mc rl.num_iterations=60
    rl.questions_per_iteration=4 rl.samples_per_question=4 rl.max_new_tokens=3 rl.top_k=4
    midtrain.adapter.kind=dora midtrain.adapter.bits=4 midtrain.adapter.group_size=32 midtrain.adapter.dropout=0.1
    rl.adapter.kind=lora rl.adapter.rank=2 rl.kl_coefficient=0.01
"""
WEIGHTS = {"midtrain": "adapters.safetensors", "rl": "adapters.safetensors"}  # others: model.safetensors


TRAININGS = ("pretrain", "midtrain", "sft", "rl")
ENDS = (
    ("pretrain", 30, signal.SIGTERM),
    ("midtrain", 27, signal.SIGKILL),
    ("sft", 10, signal.SIGKILL),
    ("rl", 20, signal.SIGINT),
)
MORE_ENDS = (
    ("pretrain", 5, signal.SIGKILL),
    ("pretrain", 30, signal.SIGTERM),
    ("midtrain", 3, signal.SIGTERM),
    ("midtrain", 27, signal.SIGKILL),
    ("sft", 10, signal.SIGKILL),
    ("sft", 40, signal.SIGTERM),
    ("rl", 4, signal.SIGKILL),
    ("rl", 20, signal.SIGTERM),
    ("rl", 35, signal.SIGINT),
)


@dataclass
class Story:
    """What happened to one outputs folder: exit codes and outputs of the invocations, in order."""

    outputs: Path
    ends: tuple[tuple[str, int, signal.Signals], ...] = ()
    codes: list[int] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    def manifest(self, step: str) -> dict[str, Any]:
        """Return the manifest of a step's only artifact."""
        (found,) = (manifest for manifest in Store(self.outputs).manifests() if manifest["step"] == step)
        return found

    def file(self, step: str, name: str) -> Path:
        """Return a file of a step's artifact."""
        return self.outputs / "store" / self.manifest(step)["name"] / name


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> list[str]:
    """The tiny settings, in which SFT practises nothing but to answer with a letter."""
    other = [item for item in tiny if item.startswith("sft.mixture.") and ".facts_mc." not in item]
    kept = [item for item in tiny if item not in other]
    rl = compose_config(["experiment=smoke"]).config.rl
    removed = [item.partition(".size=")[0] for item in other]
    removed += [f"rl.{name}.options.{key}" for name in ("task", "evaluation") for key in getattr(rl, name).options]
    return [*kept, *(f"~{key}" for key in removed), *SETTINGS.split()]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], mlxchat: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A run that nothing happened to."""
    story = Story(tmp_path_factory.mktemp("undisturbed") / "outputs")
    done = mlxchat(*settings, f"outputs={story.outputs}", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return story


@pytest.fixture(
    scope="module",
    params=[pytest.param(ENDS, id="once"), pytest.param(MORE_ENDS, id="early and late", marks=pytest.mark.slow)],
)
def disturbed(
    request: pytest.FixtureRequest,
    settings: list[str],
    start_mlxchat: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Story:
    """The same, killed or asked to stop in each training, and each time started again."""
    story = Story(tmp_path_factory.mktemp("disturbed") / "outputs", request.param)
    for step, iteration, number in (
        *story.ends,
        (None, None, None),
    ):
        process = start_mlxchat(*settings, f"outputs={story.outputs}")
        if step is not None:
            wait_for(process, story.outputs, step, iteration)
            process.send_signal(number)
        text, _ = process.communicate(timeout=200)
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
            if (
                attempts
                and attempts[0].get("step") == step
                and records
                and records[-1].get("iteration", 0) >= iteration
            ):
                return
        time.sleep(0.005)
    pytest.fail(f"ended before iteration {iteration} of {step}: {process.communicate()[0]}")


def test_each_end_has_its_exit_code(disturbed: Story) -> None:
    expected = [-number if number == signal.SIGKILL else 128 + number for _, _, number in disturbed.ends]
    assert disturbed.codes == [*expected, 0], disturbed.printed


def test_a_stop_is_told_in_one_line_with_the_way_on(disturbed: Story) -> None:
    totals = dict(zip(TRAININGS, (60, 60, 80, 60), strict=True))
    for printed, (step, _, number) in zip(disturbed.printed, disturbed.ends, strict=False):
        if number == signal.SIGKILL:
            continue
        assert f"{step} stopped: saved at iteration " in printed
        assert f" of {totals[step]:,}. The same command continues from there." in printed
        assert "Traceback" not in printed


def test_the_next_invocation_says_that_it_resumes(disturbed: Story) -> None:
    for printed, (step, _, _) in zip(disturbed.printed[1:], disturbed.ends, strict=True):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{step} ") and " run " in line)
        assert line.endswith("missing, resumes")


@pytest.mark.parametrize("step", TRAININGS)
def test_the_manifest_lists_every_execution_and_where_it_continued(step: str, disturbed: Story) -> None:
    numbers = [number for each, _, number in disturbed.ends if each == step]
    outcomes = [*("killed" if number == signal.SIGKILL else "interrupted" for number in numbers), "done"]
    attempts = disturbed.manifest(step)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == outcomes
    # A killed execution cannot tell where it began; every other one can.
    starts = [attempt["resumed_from"] for attempt in attempts if attempt["outcome"] != "killed"]
    if outcomes[0] != "killed":
        assert starts.pop(0) is None
    assert starts == sorted(starts)
    assert min(starts) > 0


@pytest.mark.parametrize("step", TRAININGS)
def test_the_model_is_the_same_bit_for_bit(step: str, disturbed: Story, undisturbed: Story) -> None:
    name = WEIGHTS.get(step, "model.safetensors")
    assert disturbed.file(step, name).read_bytes() == undisturbed.file(step, name).read_bytes()
    assert disturbed.manifest(step)["tree"] == undisturbed.manifest(step)["tree"]
    for file in undisturbed.manifest(step)["outputs"]:
        if file["path"] not in OBSERVATIONS:
            assert file in disturbed.manifest(step)["outputs"]


def test_each_training_has_changed_the_model(undisturbed: Story) -> None:
    # Otherwise equal models would prove nothing.
    name = "model.safetensors"
    assert hash_file(undisturbed.file("sft", name)) != hash_file(undisturbed.file("pretrain", name))
    for step, file in WEIGHTS.items():
        arrays = load_file(undisturbed.file(step, file))
        assert all(value.any() for name, value in arrays.items() if name.endswith("lora_b"))


OBSERVED = ("tokens_per_second", "mfu", "data_wait_frac", "elapsed_seconds", "peak_memory_bytes")


@pytest.mark.parametrize("step", TRAININGS)
def test_the_records_have_every_iteration_once_and_the_same_losses(
    step: str, disturbed: Story, undisturbed: Story
) -> None:
    def records(story: Story) -> list[dict[str, Any]]:
        lines = story.file(step, "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in OBSERVED} for line in lines]

    assert records(disturbed) == records(undisturbed)
    losses = [record["iteration"] for record in records(disturbed) if "loss" in record]
    assert losses == list(range(1, len(losses) + 1))


@pytest.mark.parametrize("step", TRAININGS)
def test_the_final_numbers_are_the_same(step: str, disturbed: Story, undisturbed: Story) -> None:
    assert disturbed.manifest(step)["metrics"] == undisturbed.manifest(step)["metrics"]
    assert disturbed.manifest(step)["derived"] == undisturbed.manifest(step)["derived"]


def test_nothing_is_left_over(disturbed: Story) -> None:
    assert list((disturbed.outputs / "work").iterdir()) == []
    made = [manifest["step"] for manifest in Store(disturbed.outputs).manifests()]
    assert len(made) == len(list((disturbed.outputs / "store").iterdir()))
    assert sorted(set(made) - {"tokens"}) == sorted(step for step in made if step != "tokens")
    assert set(made) == {"corpus", "tokenizer", *TRAININGS, "tokens"}


def test_a_sweep_that_is_stopped_starts_no_further_job(
    settings: list[str], start_mlxchat: Callable[..., Any], tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    process = start_mlxchat("-m", *settings, "stage=pretrain", "pretrain.num_iterations=400,401", f"outputs={outputs}")
    wait_for(process, outputs, "pretrain", 5)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 143, text
    assert "Traceback" not in text
    assert "pretrain stopped: saved at iteration " in text
    plans = [json.loads(path.read_text()) for path in (outputs / "runs").glob("*/plan.json")]
    trained = [plan for plan in plans if any(step["step"] == "pretrain" for step in plan["steps"])]
    assert len(trained) == 1, "the run that makes what jobs share trains nothing"
