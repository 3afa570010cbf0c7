"""The real stages, killed where they compute and save: the next run gives the same bytes."""

import resource
import shutil

import pytest
from safetensors.numpy import save_file

from crash.conftest import check_whole
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store
from mlxchat.training import state

TRAININGS = ("pretrain", "midtrain", "sft", "rl")
SAVING = (
    "train.iteration:2", "checkpoint.arrays:1", "checkpoint.written:1", "checkpoint.renamed:1", "checkpoint.done:1",
    "train.finished:1",
)  # fmt: skip
MAKING = ("run.folder:1", "step.started:1", "step.ran:1", "publish.written:1", "publish.renamed:1")
PLACES = [(step, place) for step in TRAININGS for place in (*SAVING, *MAKING, "shared.made:1")]
PLACES.remove(("rl", "shared.made:1"))
PLACES += [(step, place) for step in ("corpus", "tokenizer", "eval_rl") for place in MAKING]
PLACES += [("pretrain", "checkpoint.arrays:3"), ("pretrain", "checkpoint.written:2")]
PLACES += [("eval_rl", "eval.answered:1"), ("eval_rl", "eval.answered:5")]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "place"), PLACES)
def test_killed_stage_gives_the_same_bytes(step, place, outputs, tiny, mlxchat):
    """Of a finished run the artifact of one step, and encoded text, is removed and made again."""
    made = refs_of(Store(outputs))[step]
    tree = read_manifest(made)["tree"]
    for folder in (made, *(outputs / "store").glob("tokens-*")):
        shutil.rmtree(folder)
    command = (*tiny, "machine.checkpoint_seconds=0", f"targets=[{step}]", f"outputs={outputs}")
    killed = mlxchat(*command, environ={"MLXCHAT_CRASH_AT": place})
    assert killed.returncode == -9, killed.stdout + killed.stderr
    check_whole(outputs)
    done = mlxchat(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    check_whole(outputs)
    assert list((outputs / "work").iterdir()) == []
    assert read_manifest(refs_of(Store(outputs))[step])["tree"] == tree


def test_disk_that_fills_during_a_save_costs_no_earlier_save(tiny, say, monkeypatch, tmp_path):
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
    command = (*tiny, "machine.checkpoint_seconds=0", "targets=[pretrain]", f"outputs={tmp_path}/outputs")
    message = "error: step pretrain failed: File too large while saving\n"
    assert f"{message}       Fix that in {tmp_path}/outputs and run the same" in say(*command, code=1)
    say(*command)
    made = read_manifest(refs_of(Store(tmp_path / "outputs"))["pretrain"])
    assert [attempt.get("resumed_from") for attempt in made["attempts"]] == [None, 2]
