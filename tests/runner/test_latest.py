"""The latest run is the last one that finished a model."""

import signal
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import DataError, Interrupted
from mlxchat.pipeline import _name_again
from mlxchat.store.naming import find, find_model, refs_of

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
