"""Learning from a teacher's distributions: who may teach, what is learnt, and that it ends the same however it went."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import composed, make_model
from kit.training import NumberedBatches, make_optimizer, schedule
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TeacherConfig
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import ConfigError, DataError, Interrupted
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.optim.optimizer import Rates
from mlxchat.planning.given import check_given
from mlxchat.planning.memory import Training, check_memory
from mlxchat.runner.plan import Pipeline, make_plan
from mlxchat.store.files import Records
from mlxchat.store.fingerprint import identity_of
from mlxchat.store.manifest import write_manifest
from mlxchat.store.store import Store
from mlxchat.training.batches import mean_batch
from mlxchat.training.forecast_finetune import measure_teacher
from mlxchat.training.loop import fit
from mlxchat.training.step import TrainStep
from mlxchat.training.teacher import compare_vocabularies, load_teacher, spell_tokens

TEACHER = TeacherConfig(path=None, artifact=None, weight=0.5, temperature=1.0, top_k=None)


def make_teacher(vocab_size: int = 280, **sizes: Any) -> GPT:
    """Return a model of other sizes than the student's."""
    other = {"num_layers": 3, "num_heads": 2, "width": 16, "seed": 11, "scale": 0.4}
    return make_model(**{**other, "vocab_size": vocab_size, **sizes})


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A checkpoint of ours."""
    path = tmp_path / "teacher"
    path.mkdir()
    save_checkpoint(path, make_teacher(), tokenizer, {"format": "chat"})
    return path


@pytest.fixture
def exported(folder: Path, tmp_path: Path) -> Path:
    """The same as a folder that only mlx-lm opens."""
    pytest.importorskip("mlx_lm")
    path = shutil.copytree(folder, tmp_path / "exported")
    for name in ("checkpoint.json", "ranks.tiktoken"):
        (path / name).unlink()
    return path


def load(folder: Path, tokenizer: Tokenizer, **changes: Any) -> Any:
    return load_teacher(replace(TEACHER, **changes), folder, tokenizer, row_tokens=16, dtype=mx.float32)


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


@pytest.mark.parametrize("kind", ["ours", "of mlx-lm"])
@pytest.mark.parametrize("micro_tokens", [16, 64])
def test_a_step_reports_the_cross_entropy_and_the_divergence_over_what_is_trained_on(
    kind: str, micro_tokens: int, request: pytest.FixtureRequest, tokenizer: Tokenizer,
) -> None:  # fmt: skip
    place = request.getfixturevalue("folder" if kind == "ours" else "exported")
    student, batch = make_model(), batch_of(0)
    ce, kl = expected_parts(student, make_teacher(), batch)
    step = TrainStep(
        student, make_optimizer(student), micro_tokens=micro_tokens, dtype=mx.float32,
        distillation=load(place, tokenizer, weight=0.25),
    )  # fmt: skip
    loss, norm = step(batch, Rates(1.0, 0.0, 0.9))
    # mlx-lm adds 1e-5 where ours adds 1.2e-7 to the mean squares of its norms.
    tolerance = 1e-5 if kind == "ours" else 2e-3
    assert step.loss_parts == pytest.approx({"ce": ce, "kl": kl}, rel=tolerance)
    assert loss == pytest.approx(0.75 * ce + 0.25 * kl, rel=tolerance)
    assert norm > 0


def test_gradients_do_not_depend_on_whether_mlx_lm_or_we_compute_the_teacher(
    folder: Path, exported: Path, tokenizer: Tokenizer
) -> None:
    found = []
    for place in (folder, exported):
        student = make_model()
        step = TrainStep(
            student, make_optimizer(student), micro_tokens=64, dtype=mx.float32,
            distillation=load(place, tokenizer, weight=1.0, temperature=2.0),
        )  # fmt: skip
        found.append({name: np.asarray(value) for name, value in step.gradients(batch_of(1))[1].items()})
    ours, outside = found
    for name, value in ours.items():
        np.testing.assert_allclose(outside[name], value, atol=5e-3 * np.abs(value).max() + 1e-9, err_msg=name)


def test_without_a_teacher_nothing_is_reported() -> None:
    student = make_model()
    step = TrainStep(student, make_optimizer(student), micro_tokens=64, dtype=mx.float32)
    step(batch_of(0), Rates(1.0, 0.0, 0.9))
    assert step.loss_parts == {}


def train(
    make_context: Callable[..., Any], numbers: Any,
    distillation: Any, name: str, stop_after: int | None = None, iterations: int = 8,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    model = make_model()
    optimizer = make_optimizer(model)

    def stop() -> int | None:
        return 15 if stop_after is not None and numbers.number >= stop_after else None

    ctx = make_context(name, stop, checkpoint_seconds=0)
    fit(ctx, model, optimizer, numbers, num_iterations=iterations,
        schedule=schedule(warmup_frac=0.2, warmdown_frac=0.5), hooks=[], micro_tokens=64,
        distillation=distillation)  # fmt: skip
    return ctx, {key: np.asarray(value) for key, value in flatten_parameters(model).items()}


@pytest.mark.parametrize("kind", ["ours", "of mlx-lm"])
def test_a_training_that_was_stopped_ends_with_the_same_bits(
    kind: str, request: pytest.FixtureRequest, tokenizer: Tokenizer, make_context: Callable[..., Any],
) -> None:  # fmt: skip
    place = request.getfixturevalue("folder" if kind == "ours" else "exported")
    whole, weights = train(make_context, NumberedBatches(), load(place, tokenizer, top_k=7), "whole")
    with pytest.raises(Interrupted):
        train(make_context, NumberedBatches(), load(place, tokenizer, top_k=7), "cut", stop_after=3)
    cut, again = train(make_context, NumberedBatches(), load(place, tokenizer, top_k=7), "cut")
    assert cut.resumed_from == 3
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    assert {key: whole.metrics[key] for key in ("loss", "ce", "kl")} == {
        key: cut.metrics[key] for key in ("loss", "ce", "kl")
    }


def test_both_parts_of_the_loss_are_curves(
    folder: Path, tokenizer: Tokenizer, make_context: Callable[..., Any],
) -> None:  # fmt: skip
    ctx, _ = train(make_context, NumberedBatches(), load(folder, tokenizer), "run")
    records = Records(ctx.work / "records" / "metrics.jsonl").read()
    assert len(records) >= 1
    for record in records:
        assert record["loss"] == pytest.approx(0.5 * record["ce"] + 0.5 * record["kl"], rel=1e-5)


def test_a_teacher_is_learnt_faster_from_its_distributions_than_from_its_samples(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Few tokens of the teacher's, the same for both; held-out ones of the teacher's judge."""
    teacher = make_teacher()
    path = tmp_path / "teacher"
    path.mkdir()
    save_checkpoint(path, teacher, tokenizer, {"format": "chat"})
    rng = np.random.default_rng(0)

    def sample(rows: int) -> list[Any]:
        ids = rng.integers(0, 280, (rows, 1)).astype(np.int32)
        for _ in range(16):
            logits = np.asarray(teacher(mx.array(ids))[:, -1])
            chosen = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
            ids = np.concatenate([ids, chosen[:, None].astype(np.int32)], axis=1)
        return [(row[:-1], row[1:]) for row in ids]

    train_rows, held_out = sample(32), mean_batch(sample(32))
    losses = {}
    for weight in (0.0, 0.9):
        student = make_model()
        distillation = load(path, tokenizer, weight=weight) if weight else None
        step = TrainStep(
            student, make_optimizer(student), micro_tokens=512, dtype=mx.float32, distillation=distillation
        )
        for iteration in range(16):
            step(mean_batch(train_rows[8 * (iteration % 4) :][:8]), Rates(0.3, 0.0, 0.9))
        losses[weight] = expected_parts(student, teacher, held_out)[0]
    assert losses[0.9] < losses[0.0] - 0.1


def test_another_vocabulary_is_refused_with_the_difference(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = train_tokenizer(["a completely different text about zebras, quartz and jazz " * 5], 281)
    path = tmp_path / "other"
    path.mkdir()
    save_checkpoint(path, make_teacher(281), other, {"format": "chat"})
    with pytest.raises(DataError, match=r"281 tokens there, 280 here, .* ids differ .*here.*mlxchat distill"):
        load(path, tokenizer)
    outside = shutil.copytree(path, tmp_path / "outside")
    for name in ("checkpoint.json", "ranks.tiktoken"):
        (outside / name).unlink()
    pytest.importorskip("mlx_lm")
    with pytest.raises(DataError, match="281 tokens there, 280 here"):
        load(outside, tokenizer)


def test_vocabularies_are_compared_id_by_id(tokenizer: Tokenizer) -> None:
    ours = spell_tokens(tokenizer)
    record = json.loads(json.dumps(tokenizer._to_hf()))
    theirs = {index: token for token, index in record["model"]["vocab"].items()}
    theirs |= {token["id"]: token["content"] for token in record["added_tokens"]}
    assert compare_vocabularies(ours, theirs) == ""
    swapped = {**theirs, 260: theirs[261], 261: theirs[260]}
    assert compare_vocabularies(ours, swapped).startswith("280 tokens there, 280 here, 2 ids differ (id 260 is ")


def test_a_teacher_of_shorter_rows_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.mkdir()
    save_checkpoint(path, make_teacher(context_tokens=8), tokenizer, {"format": "chat"})
    with pytest.raises(DataError, match="takes 8 tokens at a time, rows have 16"):
        load(path, tokenizer)


def test_impossible_settings_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([
            "sft.teacher.path=x", "sft.teacher.artifact=y", "sft.teacher.weight=0", "sft.teacher.temperature=0.1",
            "sft.teacher.top_k=0",
        ])  # fmt: skip
    told = str(caught.value)
    for key in ("sft.teacher.path and", "sft.teacher.weight is 0", "sft.teacher.temperature", "sft.teacher.top_k is 0"):
        assert key in told


def sft_step(store: Store, **teacher: Any) -> Any:
    config = composed("pipeline=nanochat")
    config = replace(config, sft=replace(config.sft, teacher=replace(config.sft.teacher, **teacher)))
    pipeline: Pipeline = config.pipeline
    plan = make_plan(config, pipeline, store, targets=["sft"], seed=0, force=[])
    return {step.name: step for step in plan}["sft"]


def test_without_a_teacher_the_identity_says_nothing_of_one() -> None:
    assert "teacher" not in identity_of(composed().sft)


def test_what_is_in_the_teachers_folder_is_part_of_the_identity_and_where_it_lies_is_not(
    folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "outputs")
    without = sft_step(store).key
    first = sft_step(store, path=str(folder)).key
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert sft_step(store, path=str(moved)).key == first != without
    assert sft_step(store, path=str(moved), temperature=2.0).key != first
    save_checkpoint(moved, make_teacher(seed=12), Tokenizer.load(moved), {"format": "chat"})
    assert sft_step(store, path=str(moved)).key != first


def test_an_artifact_that_teaches_is_an_input_of_the_step(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = Store(tmp_path / "outputs")
    names = [f"sft-d2-{letter * 16}" for letter in "ab"]
    for seed, name in enumerate(names):
        place = store.outputs / "store" / name
        place.mkdir(parents=True)
        save_checkpoint(place, make_teacher(seed=seed), tokenizer, {"format": "chat"})
        manifest = {
            "rid": name[-16:] + "x" * 36, "name": name, "stage": "sft", "step": "sft", "kind": "checkpoint",
            "version": 1, "config": {}, "inputs": {}, "tree": str(seed) * 64, "outputs": [], "metrics": {},
            "attempts": [], "run": "run",
            "published": "2026-01-01T00:00:00+00:00",
        }  # fmt: skip
        write_manifest(place, manifest)
    steps = [sft_step(store, artifact=name) for name in names]
    assert [step.artifacts["teacher"]["name"] for step in steps] == names
    assert len({sft_step(store).key, *(step.key for step in steps)}) == 3
    assert sft_step(store, artifact="a" * 16).key == steps[0].key, "by any of its names"


def test_a_teacher_that_does_not_fit_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    config = compose_config([f"sft.teacher.path={folder}", f"outputs={tmp_path / 'outputs'}"]).config
    plan = make_plan(config, config.pipeline, Store(tmp_path / "outputs"), targets=["sft"], seed=0, force=[])
    with pytest.raises(ConfigError) as caught:
        check_given(config, plan)
    told = str(caught.value)
    assert "has 280 tokens, the model will have 4,096" in told
    assert "takes 64 tokens at a time" in told


def test_a_teacher_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model-2.safetensors").write_bytes(bytes(300_000_000))
    outputs = tmp_path / "outputs"
    settings = ["model.depth=2", f"sft.teacher.path={folder}", "machine=cpu", "machine.memory_limit_bytes=300000000"]
    config = compose_config([*settings, f"outputs={outputs}"]).config
    plan = make_plan(config, config.pipeline, Store(outputs), targets=["sft"], seed=0, force=[])
    with pytest.raises(ConfigError, match=r"sft needs about .*; no sft\.teacher; "):
        check_memory(config, plan)


def test_the_predicted_peak_grows_by_the_teacher(folder: Path) -> None:
    config = composed()
    sizes = make_teacher().sizes
    size = measure_teacher(folder)
    assert size.weights == (folder / "model.safetensors").stat().st_size
    alone = Training(sizes=sizes, optimizer=config.optimizer, rows=4, row_tokens=16)
    assert replace(alone, teacher=size).peak_bytes(4) >= alone.peak_bytes(4) + size.weights
