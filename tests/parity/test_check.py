"""`check.py` fails on altered values of every kind, and reports files that it cannot read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import compare_model
import mlx.core as mx
import numpy as np
import pytest
from comparison import Comparison, Unchecked, exact, largest
from parity_file import FOLDER, ParityFile, architecture_features
from safetensors.numpy import load_file, save_file

from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.model.sizes import GPTSizes, flops_per_token
from mlxchat.optim.optimizer import Rates
from mlxchat.training.batches import mean_batch
from mlxchat.training.step import TrainStep

Alter = Callable[[Any], Any]


def failures(path: Path, quantity: str) -> list[str]:
    """Return the names of a quantity's failed lines."""
    file = check.open_file(path)
    (compared,) = (each for each in check.QUANTITIES[file.kind] if each.__name__ == quantity)
    return [line.name for line in check.compare(file, compared) if isinstance(line, Comparison) and not line.ok]


# Altered values


def flip(row: Any, place: Any = -1) -> None:
    row[place] = row[place] + 1


def swap(row: list[Any]) -> None:
    row[-1], row[-2] = row[-2], row[-1]


def best_fit(values: Any, case: int, batch: int) -> Any:
    return values["jul2026_bestfit"][case]["batches"][batch]


def sized(values: Any, variant: str, row: int) -> Any:
    return values[variant]["hyperparameters"][0]["rows"][row]


def first_long(rows: list[Any]) -> list[Any]:
    return next(row for row in rows if len(row) > 3)


JSON: dict[str, tuple[str, str, Alter]] = {
    "a merge": ("tokenizer", "training", lambda v: swap(v["mergeable_ranks_base64"])),
    "an encoded text": ("tokenizer", "encoding", lambda v: flip(first_long([case["ids"] for case in v["encode"]]))),
    "a small corpus": ("tokenizer", "small_corpora", lambda v: swap(v["training_cases"][0]["learned_base64"])),
    "a conversation": ("conversation", "conversations", lambda v: flip(v["cases"][0]["ids"], 3)),
    "a prompt": ("conversation", "prompts", lambda v: flip(v["cases"][0]["completion_ids"])),
    "a refusal": (
        "conversation", "refusals", lambda v: v["errors"][0].update(conversation=v["cases"][0]["conversation"])
    ),
    "a row of documents": ("packing", "documents", lambda v: flip(best_fit(v, 4, 5)["inputs"][2])),
    "a row of conversations": (
        "packing", "conversations", lambda v: flip(v["chat_jul2026"][1]["batches"][0]["targets"][0])
    ),
    "a multiplier": ("schedules", "schedules", lambda v: swap(v["jul2026"]["schedules"][5]["lr_multiplier"])),
    "a multiplier over progress": (
        "schedules", "progress", lambda v: flip(v["jul2026"]["progress_schedules"][0]["lr_multiplier"], 2)
    ),
    "a run of a script": ("schedules", "scripts", lambda v: flip(v["jul2026"]["script_runs"][0]["muon_weight_decay"])),
    "an iteration": ("schedules", "hyperparameters", lambda v: sized(v, "oct2025", 2).update(num_iterations=1)),
    "bits per byte": (
        "bpb", "bits", lambda v: v["cases"][5]["jul2026"].update(bpb=v["cases"][5]["jul2026"]["bpb"] + 1e-5)
    ),
    "counted bytes": ("bpb", "counted_bytes", lambda v: v["cases"][0].update(total_bytes=1)),
    "a mean loss": ("bpb", "losses", lambda v: v["mean_loss"]["oct2025"].update(text1=1.0885)),
    "an advantage": ("rl", "advantages", lambda v: flip(v["cases"][1]["examples"][0]["advantages"])),
    "a trained token": ("rl", "trained_tokens", lambda v: flip(v["cases"][0]["examples"][0]["targets"][0], 20)),
    "a policy loss": ("rl", "policy_gradient", lambda v: v["cases"][0]["oct2025"].update(loss_sum_over_passes=0.5)),
    "a moved weight": (
        "rl", "update", lambda v: v["cases"][0]["jul2026"]["update_norms"].update({"lm_head.weight": 0.1})
    ),
    "a multiplier of RL": ("rl", "multipliers", lambda v: v["cases"][2].update(lr_multiplier=1.0)),
    "pass@k": ("rl", "passes", lambda v: flip(v["pass_at_k"]["pass_at_k"])),
    "a forced token": ("engine", "protocol", lambda v: flip(v["scripted"][1]["columns"][9])),
    "an exit": ("engine", "refusals", lambda v: flip(v["exit_in_expression"]["jul2026"]["batch_results"][0])),
    "a probability": ("engine", "distributions", lambda v: flip(v["sampling"][3]["probs"][0])),
    "a greedy token": ("engine", "greedy", lambda v: flip(v["greedy"]["jul2026"][1]["tokens"])),
    "a letter's logit": (
        "core", "letters", lambda v: flip(v["chat_categorical"]["oct2025"][0]["results"][3]["letter_logits"])
    ),
    "a ChatCORE": ("core", "metric", lambda v: v["chatcore"]["jul2026"][0].update(chatcore=0.08)),
    "a program's verdict": ("tasks", "executions", lambda v: v["humaneval"]["evaluate"][0].update(success=False)),
    "a calculation": ("tasks", "calculator", lambda v: v["calculator"][0].update(result="5")),
    "a word problem": ("tasks", "gsm8k", lambda v: v["gsm8k"]["conversations"][2]["messages"][1]["content"].pop()),
    "an order of rows": ("tasks", "choices", lambda v: v["mmlu"]["permutation"].reverse()),
    "a slice": ("tasks", "orders", lambda v: v["slicing"]["cases"][3]["items"].pop()),
    "a general conversation": ("tasks", "conversations", lambda v: v["smoltalk"]["conversations"].reverse()),
    "a program": ("tasks", "programs", lambda v: v["humaneval"]["extract_program"][4].update(program="b=2")),
    "a spelled word": (
        "tasks", "spelling", lambda v: v["spellingbee"]["train"][0]["messages"][1]["content"][3].update(text="7")
    ),
}  # fmt: skip

TENSORS: dict[str, tuple[str, str, float]] = {
    "a logit": ("logits", "logits", 1e-3),
    "a token's loss": ("loss_none", "losses", 1e-3),
    "a gradient": ("grads.transformer.h.1.attn.c_v.weight", "gradients", 1e-2),
    "losses of steps": ("losses3", "optimizer_steps", 1e-2),
    "a token": ("greedy", "greedy", 1.0),
}


def original(pattern: str) -> Path:
    """Return the first file of a pattern, or skip the test."""
    found = sorted(FOLDER.glob(pattern)) if FOLDER.is_dir() else []
    if not found:
        pytest.skip("nanochat's values are missing")
    return found[0]


@pytest.mark.parametrize("what", JSON)
def test_altered_json_value_fails(what: str, tmp_path: Path) -> None:
    kind, quantity, alter = JSON[what]
    path = original(f"{kind}_*.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    alter(values)
    altered = tmp_path / path.name  # the tokenizer and models are then read from FOLDER
    altered.write_text(json.dumps(values), encoding="utf-8")
    assert failures(altered, quantity)


@pytest.mark.parametrize("variant", ["oct2025", "jul2026"])
@pytest.mark.parametrize("what", TENSORS)
def test_altered_tensor_fails(what: str, variant: str, tmp_path: Path) -> None:
    name, quantity, change = TENSORS[what]
    path = original(f"nanochat_{variant}_*.safetensors")
    file, values = ParityFile(path), load_file(path)
    values[name].reshape(-1)[-1] += np.asarray(change, values[name].dtype)
    if what == "a gradient":
        values[name] *= 1.01
    altered = tmp_path / path.name
    save_file(values, altered, metadata=file.metadata)
    assert failures(altered, quantity)


@pytest.mark.parametrize("variant", ["oct2025", "jul2026"])
def test_altered_counts_fail(variant: str, tmp_path: Path) -> None:
    path = original(f"nanochat_{variant}_*.safetensors")
    altered = tmp_path / path.name
    save_file(load_file(path), altered, metadata=ParityFile(path).metadata | {"flops_per_token": "7"})
    assert failures(altered, "counts") == ["FLOPs per token"]


def test_nan_or_no_case_fails() -> None:
    assert not Comparison("", float("nan"), 1.0).ok
    assert not largest("", {"a": 0.0, "b": float("nan")}, 1.0).ok
    assert not largest("", {}, 1.0).ok
    assert not exact("", [], 0).ok


# Other sizes


def write_own(path: Path, variant: str, **sizes: Any) -> None:
    """Write a file in the format of nanochat's, with values that our own code computes."""
    rng, config = np.random.default_rng(0), {"sequence_len": 160, **sizes}
    features = architecture_features(variant)
    if "window_pattern" in config:
        features["window_pattern"] = config["window_pattern"]
    model = GPT(
        GPTSizes(
            vocab_size=config["vocab_size"], num_layers=config["n_layer"], num_heads=config["n_head"],
            num_kv_heads=config["n_kv_head"], width=config["n_embd"], context_tokens=160, **features,
        )
    )  # fmt: skip
    weights = {
        name: rng.normal(scale=0.2, size=value.shape).astype(np.float32)
        for name, value in flatten_parameters(model).items()
    }
    ids = rng.integers(0, config["vocab_size"], (2, 161)).astype(np.int32)
    values = {"ids": ids[:, :-1].copy(), "targets": ids[:, 1:].copy(), "greedy_prompt": ids[0, :5].copy()}
    values["targets"][0, :3] = -1
    metadata = {"variant": variant, "config": json.dumps(config), "flops_per_token": str(flops_per_token(model.sizes))}
    save_file(values | {f"weights.{name}": value for name, value in weights.items()}, path, metadata=metadata)

    file = ParityFile(path)
    batch = mean_batch(list(zip(values["ids"], values["targets"], strict=True)))
    loss, gradients = compare_model.loss_and_gradients(file.model("weights."), batch)
    model = file.model("weights.")
    logits = np.asarray(model(mx.array(values["ids"])))
    likely = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    taken = np.take_along_axis(likely, np.maximum(values["targets"], 0)[..., None], -1)[..., 0]
    dtype = mx.bfloat16 if variant == "oct2025" else mx.float32
    step = TrainStep(model, compare_model.optimizer_of(model, variant, dtype), micro_tokens=1 << 30, dtype=mx.float32)
    losses3 = [step(batch, Rates(1.0, 0.95, 1.0))[0] for _ in range(3)]
    greedy = values["greedy_prompt"].tolist()
    for _ in range(4):
        greedy.append(int(mx.argmax(model(mx.array([greedy]))[0, -1]).item()))
    values |= {
        "logits": logits,
        "loss_none": np.where(values["targets"] >= 0, -taken, 0).astype(np.float32),
        "loss_mean": np.array([loss], np.float32),
        "losses3": np.array(losses3, np.float32),
        "greedy": np.array(greedy[5:], np.int32),
    }
    values |= {f"weights.{name}": value for name, value in weights.items()}
    values |= {f"grads.{name}": value for name, value in gradients.items()}
    values |= {f"after3.{name}": np.asarray(value) for name, value in flatten_parameters(model).items()}
    # safetensors ignores the strides of an array.
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path, metadata=metadata)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("oct2025", {"vocab_size": 301, "n_layer": 2, "n_head": 4, "n_kv_head": 1, "n_embd": 64}),
        (
            "jul2026",
            {"vocab_size": 130, "n_layer": 3, "n_head": 3, "n_kv_head": 3, "n_embd": 48, "window_pattern": "LSS"},
        ),
    ],
    ids=str,
)
def test_files_of_other_sizes_are_compared(
    variant: str, sizes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The values are our own, so this tests how the sizes are read, not whether we agree with nanochat."""
    path = tmp_path / f"nanochat_{variant}_zz.safetensors"
    write_own(path, variant, **sizes)
    assert check.main([str(path)]) == 0, capsys.readouterr().out


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mystery_a.json", "{}", "unknown format; expected a name like nanochat_*"),
        ("rl_a.json", "{", "cannot be read as JSON"),
        ("rl_a.json", "[]", "is JSON but not an object"),
        ("nanochat_oct2025_a.safetensors", "no tensors", "cannot be read as safetensors"),
        *((f"{kind}_a.json", "{}", "format of") for kind in check.QUANTITIES if kind != "nanochat"),
    ],
)
def test_unreadable_file_is_reported_in_one_line(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert check.main([str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert str(path) in told[0]
    assert message in told[0]


def test_check_runs_from_any_folder_and_names_a_missing_file(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(check.__file__)), "nanochat_none.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: nanochat_none.safetensors: no such file\n"


def test_unchecked_quantity_is_shown_and_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "core_q.json"
    path.write_text('{"suite": {}}', encoding="utf-8")
    monkeypatch.setitem(check.QUANTITIES, "core", (lambda file: iter([Unchecked("the CORE metric", "no time")]),))
    assert check.main([str(path)]) == 0
    assert "the CORE metric" in (told := capsys.readouterr().out)
    assert "not compared" in told
    assert "ok" not in check.show(Unchecked("a", "b"))


def test_exception_of_our_code_is_a_failed_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tasks_q.json"
    path.write_text('{"calculator": [{"expr": "1+1"}]}', encoding="utf-8")
    assert check.main([str(path)]) == 1
    assert "KeyError: 'result'" in capsys.readouterr().out
