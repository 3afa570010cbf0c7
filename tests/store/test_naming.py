"""Names of artifacts: every accepted form, and the messages for unknown and ambiguous ones."""

import signal
from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import DataError, Interrupted, StoreError
from mlxchat.pipeline import _name_again
from mlxchat.store.manifest import write_manifest
from mlxchat.store.naming import find, find_model, refs_of, resolve
from mlxchat.store.store import Store

FIRST, SECOND, THIRD = "abcdefgh" + "a" * 44, "abcdzzzz" + "b" * 44, "xyzxyzxy" + "c" * 44
RUN, NEWEST = "20260101-000000-1-toy", "20260102-000000-2-other"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "outputs")
    found.prepare()
    for stage, rid in (("sft", FIRST), ("sft", SECOND), ("rl", THIRD)):
        folder = found.outputs / "store" / f"{stage}-d4-{rid[:16]}"
        folder.mkdir()
        record = {"rid": rid, "stage": stage, "step": stage, "published": f"2026-01-0{len(stage)}", "outputs": []}
        write_manifest(folder, record)
    found.set_ref(NEWEST, "sft", found.outputs / "store" / f"sft-d4-{FIRST[:16]}")
    found.set_ref(RUN, "sft", found.outputs / "store" / f"sft-d4-{SECOND[:16]}")
    found.set_ref("pins", "best", found.outputs / "store" / f"rl-d4-{THIRD[:16]}")
    return found


@pytest.mark.parametrize(
    ("name", "rid"),
    [
        ("sft", FIRST), ("latest/sft", FIRST), (f"{RUN}/sft", SECOND), ("toy/sft", SECOND), ("best", THIRD),
        ("pins/best", THIRD), (f"sft-d4-{FIRST[:16]}", FIRST), ("abcde", FIRST), (SECOND, SECOND), ("x", THIRD),
    ],
)  # fmt: skip
def test_every_form_of_a_name_is_resolved(name, rid, store):
    assert resolve(store, name).name.endswith(rid[:16])


def test_ambiguous_prefix_lists_candidates(store):
    with pytest.raises(StoreError, match=rf'"abcd" is ambiguous.*sft-d4-{FIRST[:16]}, sft-d4-{SECOND[:16]}.*more of'):
        resolve(store, "abcd")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sftt", "sft"), ("bestt", "best"), ("nothing/sft", ""), ("rl-d4-xyz", "rl-d4-xyzxyzxycccccccc"), ("", "")],
)
def test_unknown_name_suggests_the_nearest(name, hint, store):
    with pytest.raises(StoreError) as caught:
        resolve(store, name)
    assert f'Did you mean "{hint}"?' in str(caught.value) or not hint


def test_step_of_the_latest_run_comes_before_a_pin(store):
    store.set_ref("pins", "sft", store.outputs / "store" / f"rl-d4-{THIRD[:16]}")
    assert resolve(store, "sft").name.endswith(FIRST[:16])
    assert resolve(store, "pins/sft").name.startswith("rl")


BASE = {"corpus": {"stage": "make"}, "pretrain": {"stage": "pretrain", "source": "corpus"}}
WHOLE = {**BASE, "sft": {"stage": "sft", "source": "pretrain"}, "eval": {"stage": "copy", "source": "corpus"}}


@pytest.fixture
def models(toys: Any) -> Any:
    """Stages that make models: of `pretrain` the number is toy.number, of `sft` other.number."""
    body = "(ctx.out / 'result.txt').write_text(str(ctx.config.{}.number))"
    toys.add("pretrain", body.format("toy"), inputs={"source": "thing"}, produces="checkpoint")
    toys.add("sft", body.format("other"), inputs={"source": "checkpoint"}, config=("other",), produces="checkpoint")
    return toys


def chosen(models: Any) -> tuple[str, str]:
    """Return the step and the run of the model that is used where none is named."""
    found = find_model(models.store, None)
    return found.place.name.split("-")[0], str(found.run)


def test_latest_is_the_last_run_that_finished_a_model(models):
    models.run(models.plan(WHOLE))
    assert (chosen(models), set(refs_of(models.store))) == (("sft", "run1"), set(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan({"corpus": BASE["corpus"]}))
    assert chosen(models) == ("sft", "run1"), "the other run has no model"
    models.run(models.plan(BASE))
    assert (chosen(models), set(refs_of(models.store))) == (("pretrain", "run3"), set(BASE))
    assert find(models.store, "sft").run == "run1", "a step that the latest run lacks is of the last run that has it"
    models.config.toy.number = 1
    models.run(models.plan(WHOLE))
    assert chosen(models) == ("sft", "run4"), "its models are reused"
    models.add("sft", "raise DataError('no')", inputs={"source": "checkpoint"}, produces="checkpoint", version=2)
    with pytest.raises(DataError, match=r"^no$"):
        models.run(models.plan(WHOLE))
    assert chosen(models) == ("sft", "run4"), "the failed run finished no model"


def test_stopped_run_with_a_model_is_latest(models):
    handler = signal.getsignal(signal.SIGINT)
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.add(
        "pretrain", "(ctx.out / 'result.txt').touch(); os.kill(os.getpid(), signal.SIGINT)",
        inputs={"source": "thing"}, produces="checkpoint",
    )  # fmt: skip
    with pytest.raises(Interrupted):
        models.run(models.plan(WHOLE))
    assert signal.getsignal(signal.SIGINT) is handler
    assert chosen(models) == ("pretrain", "run2")


def test_finished_command_makes_its_run_latest(models):
    models.run(models.plan(WHOLE))
    models.config.toy.number = 2
    models.run(models.plan(BASE))
    models.config.toy.number = 1
    _name_again(compose_config(["name=again"]), models.plan(WHOLE), models.store)
    assert chosen(models) == ("sft", "run1")
