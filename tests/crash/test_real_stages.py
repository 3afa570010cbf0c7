"""The real stages, killed where they compute and save: the next run gives the same bytes."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from crash.conftest import check_whole
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store
from mlxchat.training import state

_SETTINGS = """
    machine.checkpoint_seconds=0
    pretrain.num_iterations=5 midtrain.num_iterations=4 sft.num_iterations=4 rl.num_iterations=4
    rl.questions_per_iteration=2 rl.samples_per_question=2 rl.task.size=8
"""
# Step → what it needs, and what it saves between.
TRAININGS = ("pretrain", "midtrain", "sft", "rl")
PIPELINE = ("corpus", "tokenizer", *TRAININGS, "eval_rl")
SAVING = (
    "train.iteration:2", "checkpoint.arrays:2", "checkpoint.written:3", "checkpoint.renamed:3", "checkpoint.done:1",
    "train.finished:1",
)  # fmt: skip
MAKING = ("run.folder:1", "step.started:1", "step.ran:1", "publish.written:1", "publish.renamed:1", "shared.made:1")


@pytest.fixture(scope="module")
def settings(tiny: tuple[str, ...]) -> list[str]:
    """Tiny settings with a training of few iterations, each of which is saved."""
    mine = _SETTINGS.split()
    keys = {item.partition("=")[0] for item in mine}
    return [*(item for item in tiny if item.partition("=")[0] not in keys), *mine]


def complete(
    mlxchat: Callable[..., Any], settings: list[str], outputs: Path, step: str, **environ: str
) -> tuple[int, str]:
    """Run the pipeline up to a step; return exit code and what was printed."""
    done = mlxchat(*settings, f"targets=[{step}]", f"outputs={outputs}", environ=environ, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def stages(
    settings: list[str], mlxchat: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, str]]:
    """Return a function: step → outputs in which everything it needs is done, and the digest it must end with."""
    outputs = tmp_path_factory.mktemp("stages") / "outputs"
    before: dict[str, tuple[Path, str]] = {}

    def prepare(step: str) -> tuple[Path, str]:
        for name in PIPELINE[: PIPELINE.index(step) + 1]:
            if name in before:
                continue
            place = outputs.with_name(name)
            if outputs.exists():
                shutil.copytree(outputs, place, symlinks=True)
            code, text = complete(mlxchat, settings, outputs, name)
            assert code == 0, text
            before[name] = (place, read_manifest(refs_of(Store(outputs))[name])["tree"])
        return before[step]

    return prepare


def kill_and_continue(
    step: str, place: str, prepared: tuple[Path, str], settings: list[str], mlxchat: Callable[..., Any], folder: Path
) -> None:
    """Kill a run at a place, check what it leaves, run again, and compare with the undisturbed digest."""
    before, tree = prepared
    outputs = folder / "outputs"
    if before.exists():
        shutil.copytree(before, outputs, symlinks=True)
    code, text = complete(mlxchat, settings, outputs, step, MLXCHAT_CRASH_AT=place)
    assert code == -9, (place, code, text)
    check_whole(outputs)
    code, text = complete(mlxchat, settings, outputs, step)
    assert code == 0, text
    check_whole(outputs)
    assert list((outputs / "work").iterdir()) == []
    assert read_manifest(refs_of(Store(outputs))[step])["tree"] == tree


WHOLE = [
    (step, place) for step in TRAININGS for place in (*SAVING, *MAKING) if (step, place) != ("rl", "shared.made:1")
]
WHOLE += [(step, place) for step in ("corpus", "tokenizer", "eval_rl") for place in MAKING if place != "shared.made:1"]
ANSWERED = "eval.answered"
WHOLE += [("eval_rl", f"{ANSWERED}:{passing}") for passing in (1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "place"), WHOLE)
def test_killed_stage_gives_the_same_bytes(step, place, stages, settings, mlxchat, tmp_path):
    kill_and_continue(step, place, stages(step), settings, mlxchat, tmp_path)


def test_disk_that_fills_during_a_save_costs_no_earlier_save(settings, say, monkeypatch, tmp_path):
    saves = []

    def save_to_full_disk(arrays, path):
        saves.append(path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if len(saves) == 3 else limits[0], limits[1]))
        try:
            save_file(arrays, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(state, "save_file", save_to_full_disk)
    command = (*settings, "targets=[pretrain]", f"outputs={tmp_path}/outputs")
    message = "error: step pretrain failed: File too large while saving\n"
    assert f"{message}       Fix that in {tmp_path}/outputs and run the same" in say(*command, code=1)
    say(*command)
    made = read_manifest(refs_of(Store(tmp_path / "outputs"))["pretrain"])
    assert [attempt.get("resumed_from") for attempt in made["attempts"]] == [None, 2]
