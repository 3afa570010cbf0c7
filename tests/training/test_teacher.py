"""Learning from a teacher's distributions: which teachers fit, what is learnt, and that it resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.training import make_optimizer, schedule
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TeacherConfig
from mlxchat.data.packing import mean_batch
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import ConfigError, Interrupted
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.optim.optimizer import Rates
from mlxchat.planning.inputs import check_inputs
from mlxchat.planning.memory import check_memory
from mlxchat.runner.plan import make_plan
from mlxchat.store.store import Store
from mlxchat.training.finetune import load_teacher
from mlxchat.training.step import Distillation, TrainStep

RATES = Rates(1.0, 0.0, 0.9)
TEACHER = TeacherConfig(path=None, artifact=None, weight=0.5, temperature=1.0)


def make_teacher(vocab_size: int = 280, **sizes: Any) -> GPT:
    other = {"num_layers": 3, "num_heads": 2, "width": 24, "seed": 11, "scale": 0.4}
    return make_model(**{**other, "vocab_size": vocab_size, **sizes})


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "teacher"
    path.mkdir()
    save_checkpoint(path, make_teacher(), tokenizer, {"format": "chat"})
    return path


def load(folder: Path, tokenizer: Tokenizer, **changes: Any) -> Distillation:
    return load_teacher(replace(TEACHER, **changes), folder, tokenizer, row_tokens=16, dtype=mx.float32)


def make_step(student: GPT, distillation: Distillation | None, *, micro_tokens: int = 64) -> TrainStep:
    return TrainStep(
        student, make_optimizer(student), micro_tokens=micro_tokens, dtype=mx.float32, distillation=distillation
    )


def batch_of(seed: int, rows: int = 4) -> Any:
    ids = np.random.default_rng(seed).integers(0, 280, (rows, 17)).astype(np.int32)
    return mean_batch([(row[:-1], np.where(np.arange(16) % 3 == 0, -1, row[1:]).astype(np.int32)) for row in ids])


def expected_parts(student: GPT, teacher: GPT, batch: Any) -> tuple[float, float]:
    """Return the mean cross-entropy and the mean divergence over what is trained on, in float64."""

    def log_softmax(model: GPT) -> np.ndarray[Any, Any]:
        logits = np.asarray(model(mx.array(batch.ids)), dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    q, p = log_softmax(student), log_softmax(teacher)
    trained = batch.targets >= 0
    ce = -np.take_along_axis(q, np.maximum(batch.targets, 0)[..., None], -1)[..., 0][trained].mean()
    return float(ce), float((np.exp(p) * (p - q)).sum(-1)[trained].mean())


@pytest.mark.parametrize("micro_tokens", [16, 64])
def test_step_reports_cross_entropy_and_divergence_at_targets(micro_tokens, folder, tokenizer):
    student, batch = make_model(), batch_of(0)
    ce, kl = expected_parts(student, make_teacher(), batch)
    step = make_step(student, load(folder, tokenizer, weight=0.25), micro_tokens=micro_tokens)
    loss, norm = step(batch, RATES)
    assert step.loss_parts == pytest.approx({"ce": ce, "kl": kl}, rel=1e-5)
    assert loss == pytest.approx(0.75 * ce + 0.25 * kl, rel=1e-5)
    assert norm > 0
    alone = make_step(make_model(), None)
    alone(batch, RATES)
    assert alone.loss_parts == {}


def test_interrupted_distillation_ends_with_the_same_bits(folder, tokenizer, train):
    options = {"distillation": load(folder, tokenizer), "rates": schedule(warmdown_frac=0.5)}
    whole = train("whole", 5, **options)
    with pytest.raises(Interrupted):
        train("cut", 5, stop_after=3, **options)
    resumed = train("cut", 5, **options)
    assert (resumed.bits, resumed.ctx.resumed_from) == (whole.bits, 3)
    curves = [resumed.curve(name) for name in ("loss", "ce", "kl")]
    assert curves == [whole.curve(name) for name in ("loss", "ce", "kl")]
    assert resumed.ctx.metrics["kl"] == whole.ctx.metrics["kl"]
    for loss, ce, kl in zip(*(curve.values() for curve in curves), strict=True):
        assert loss == pytest.approx(0.5 * ce + 0.5 * kl, rel=1e-5)


def test_unsuitable_teachers_are_refused_before_anything_runs(folder, tmp_path):
    settings = ["model.depth=2", f"sft.teacher.path={folder}", "machine=cpu", "machine.memory_limit_bytes=20000000"]
    config, store = compose_config([*settings, f"outputs={tmp_path}"]).config, Store(tmp_path)
    plan = make_plan(replace(config, targets=["sft"]), store)
    config.sft.teacher.path = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"sft\.teacher: .*missing holds no model"):
        check_inputs(config, plan)
    config.sft.teacher.path = str(folder)
    with pytest.raises(ConfigError, match=r"sft needs about .*; no sft\.teacher; "):
        check_memory(config, plan)
