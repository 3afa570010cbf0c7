"""Keys cover exactly what each step reads."""

from __future__ import annotations

import json
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import RewardConfig, TaskItem
from mlxchat.rl.rewards import Reward
from mlxchat.runner.keys import pin_externals
from mlxchat.runner.plan import make_plan
from mlxchat.store.fingerprint import identity_of
from mlxchat.store.store import Store

CONVERSATION = '{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}\n'


def keys(*overrides: str) -> dict[str, str]:
    """Return step → key of the smoke run with overrides."""
    config = compose_config(["experiment=smoke", *overrides]).config
    plan = make_plan(
        config, config.pipeline, Store(Path("nowhere")), targets=None, seed=config.seed, data_seed=config.data_seed,
        force=[],
    )  # fmt: skip
    return {step.name: step.key for step in plan}


@pytest.fixture(scope="module")
def smoke() -> dict[str, str]:
    """Return the keys of the smoke run."""
    return keys()


def test_prompts_and_samples_change_no_key(smoke: dict[str, str]) -> None:
    assert keys("pretrain.prompts=[Why?]", "pretrain.sample_tokens=7", "eval.prompts=[Who are you?]") == smoke


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("core=nanochat", {"eval_base"}),
        ("suite=none", {"eval_mid", "eval_sft", "eval_rl"}),
    ],
)
def test_evaluation_key_covers_what_it_reads(override: str, changed: set[str], smoke: dict[str, str]) -> None:
    after = keys(override)
    assert {step for step in smoke if after[step] != smoke[step]} == changed


def test_moved_file_changes_no_key(tmp_path: Path) -> None:
    found = []
    for name in ("m.jsonl", "d/m.jsonl", "n.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(CONVERSATION)
        found.append(keys(f"+sft.mixture.own={{task: jsonl, path: {path}, options: {{held_out_frac: 0.0}}}}"))
    assert found[0] == found[1] == found[2]


def test_file_in_another_setting_changes_the_key(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for path, text in zip(paths, ("one", "two"), strict=True):
        Path(path).write_text(text)
    one, other = (
        {"sft": {name: TaskItem(task="jsonl", path=path) for name, path in zip("ab", files, strict=True)}}
        for files in (paths, paths[::-1])
    )
    assert identity_of(one) == identity_of(other)
    assert pin_externals(one) != pin_externals(other)


def test_order_of_reward_parts_changes_nothing() -> None:
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in their last bit, and keys do not know the order."""

    class Right:
        def reward(self, conversation: Any, text: str) -> float:
            return 1.0

    parts = {
        name: RewardConfig(kind="exact", weight=weight) for name, weight in zip("abc", (0.1, 0.2, 0.3), strict=True)
    }
    one, other = (Reward(Right(), each) for each in (parts, dict(reversed(parts.items()))))  # type: ignore[arg-type]
    assert identity_of(parts) == identity_of(dict(reversed(parts.items())))
    assert one({"messages": []}, "", 0) == other({"messages": []}, "", 0)
    assert list(one({"messages": []}, "", 0)[1]) == list(other({"messages": []}, "", 0)[1])


def test_order_of_the_suite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxchat.stages import eval as stage

    from mlxchat.evals.scores import Score

    def evaluate(engine: Any, task: TaskItem, answering: Any, **more: Any) -> tuple[Score, list[dict[str, Any]]]:
        score = Score(kind="generative", accuracy=answering.seed / 2**33, chance=0.1, num_examples=3)
        return score, [{"verdict": True, "question": task.task}]

    monkeypatch.setattr(stage, "open_item", lambda ctx, item: item)
    monkeypatch.setattr(TaskItem, "kind", "choice", raising=False)
    monkeypatch.setattr(TaskItem, "__len__", lambda item: 3, raising=False)
    monkeypatch.setattr(stage, "evaluate_task", evaluate)
    monkeypatch.setattr(stage, "forward_tokens", lambda machine, sizes: 64)
    config = compose_config(["experiment=smoke", "suite=bundled"]).config
    found = []
    for suite in (config.suite, dict(reversed(config.suite.items()))):
        ctx = SimpleNamespace(
            config=replace(config, suite=suite), metrics={}, seed=lambda purpose: zlib.crc32(purpose.encode()),
            progress=lambda total, unit: nullcontext(SimpleNamespace(update=None)), work=Path("nowhere"),
            should_stop=None, stop=None,
        )  # fmt: skip
        examples: list[dict[str, Any]] = []
        scores = stage._measure_tasks(ctx, SimpleNamespace(model=SimpleNamespace(sizes=None)), examples)  # type: ignore[arg-type]
        found.append((json.dumps(scores), examples, ctx.metrics))
    assert found[0] == found[1]


def test_other_dtype_reruns_the_step(toys: Any) -> None:
    pipeline = {"one": {"stage": "make"}, "two": {"stage": "copy", "source": "one"}}
    stage = toys.package / "make.py"
    stage.write_text(f'RESOURCES = ["gpu"]\n{stage.read_text()}')
    toys.run(toys.plan(pipeline))
    assert [step.state for step in toys.plan(pipeline)] == ["done", "done"]
    one, two = toys.plan(pipeline, compute_dtype="bfloat16")
    assert (one.state, one.reason) == ("run", "config changed: compute_dtype absent → bfloat16")
    assert two.state == "maybe"
    toys.run([one, two])
    assert [step.state for step in toys.plan(pipeline, compute_dtype="bfloat16")] == ["done", "done"]
    assert [step.state for step in toys.plan(pipeline)] == ["done", "done"], "both are kept"
