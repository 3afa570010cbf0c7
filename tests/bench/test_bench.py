"""`mlxchat bench`: configuration, measured quantities and output; no test depends on speed."""

import json
import statistics
from typing import Any

import mlx.core as mx
import pytest

from kit.artifacts import make_model, publish_base
from kit.commands import CommandLine
from mlxchat.bench import generate
from mlxchat.commands import device_checks
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config
from mlxchat.model.parameters import flatten_parameters

TINY = (
    "machine=cpu", "machine.blas_threads=1", "model=d2", "tokenizer.vocab_size=512", "bench.batch_rows=2",
    "model.context_tokens=64", "bench.steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def record(mlxchat: CommandLine) -> dict[str, Any]:
    done = mlxchat("bench", "train", *TINY, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_only_adapters_are_measured_as_trained(say):
    table = say("bench", "train", *TINY, "adapter=qlora", "adapter.rank=2")
    assert "lora of rank 2 on 4 bits (9.22k trained)" in " ".join(table.split())


def test_speeds_follow_from_the_median_of_the_seconds(record):
    assert record["tokens_per_second"] == pytest.approx(128 / statistics.median(record["seconds"]))
    assert record["forward_tokens_per_second"] == pytest.approx(128 / statistics.median(record["forward_seconds"]))
    # d2: two layers of 12 × 128² weights and a head of 512 × 128; attention over 64 tokens.
    flops = 6 * (2 * 12 * 128**2 + 512 * 128) + 12 * 2 * 128 * 64
    assert record["gflops"] == pytest.approx(flops * record["tokens_per_second"] / 1e9)
    assert record["share_of_peak"] is record["peak_gflops"] is None  # no peak of a CPU is published


def test_experiment_sets_its_sizes(say, monkeypatch):
    found: list[Config] = []
    monkeypatch.setattr("mlxchat.bench.train.measure_training", lambda config: found.append(config) or {})
    say("bench", "train", "experiment=quickstart", "--json")
    wanted = compose_config(["experiment=quickstart"]).config
    assert (found[0].model, found[0].optimizer) == (wanted.model, wanted.optimizer)
    assert (found[0].tokenizer.vocab_size, found[0].model.context_tokens) == (4096, 256)


def test_decoding_step_reads_weights_and_cache(monkeypatch):
    """Two layers 64 wide with heads of 32, of October 2025: 12 C² a layer and the head, in float32."""
    monkeypatch.setattr(generate, "_BANDWIDTH_BYTES", 1_000_000)
    monkeypatch.setattr(generate, "peak_flops", lambda dtype: 1e9)
    overrides = ["model=d2", "model.aspect_ratio=32", "model.head_width=32", "tokenizer.vocab_size=320", "machine=cpu"]
    asked = ["bench.rows=[1,3]", "bench.prompt_tokens=[36]", "bench.new_tokens=8", "bench.steps=1"]
    found = generate.measure_generation(compose_config([*overrides, *asked]).config)
    matrices, head = 2 * 12 * 64 * 64, 320 * 64
    assert found["weight_bytes_per_step"] == 4 * (matrices + head)
    assert [row["rows"] for row in found["results"]] == [1, 3]
    for row in found["results"]:
        assert row["past_bytes"] == row["rows"] * 40 * 2 * 2 * 64 * 4
        assert row["step_bytes"] == found["weight_bytes_per_step"] + row["past_bytes"]
        assert row["decode_tokens_per_second"] == pytest.approx(row["rows"] / row["step_seconds"])
        assert row["prompt_tokens_per_second"] == pytest.approx(row["rows"] * 36 / row["first_token_seconds"])
        # 2 FLOPs a weight; queries and values of 64 channels meet each of the past tokens in two layers.
        decoding, reading = (2 * w + 2 * 4 * 64 * past for w, past in ((matrices + head, 40), (matrices, 18)))
        assert row["decode_mfu"] == pytest.approx(row["decode_tokens_per_second"] * decoding / 1e9)
        assert row["prompt_mfu"] == pytest.approx(row["prompt_tokens_per_second"] * reading / 1e9)
        assert row["peak_bytes"] > found["weight_bytes_per_step"]


def test_model_is_measured_and_its_result_kept(tmp_path, say):
    outputs = tmp_path / "outputs"
    publish_base(outputs, "talks")
    asked = ["bench.rows=[1,2]", "bench.prompt_tokens=[20]", "bench.new_tokens=4", "bench.steps=1"]
    told = say("bench", "generate", "talks", *asked, f"outputs={outputs}", "--json")
    found = json.loads(next(line for line in told.splitlines() if line[:1] == "{"))
    assert found["num_parameters"] == sum(value.size for value in flatten_parameters(make_model()).values())
    (kept,) = [json.loads(path.read_text())["command"] for path in (outputs / "bench").iterdir()]
    assert "mlxchat bench generate talks 'bench.rows=[1,2]'" in kept
    assert "MFU" in say("bench", "generate", "talks", *asked, "bench.bits=4", f"outputs={outputs}")
    for arguments, told in (
        (["talks", "bench.rows=[0]", "bench.new_tokens=1"], "bench.new_tokens is 1, expected at least 2"),
        (["talks", "bench.rows=[100000000]"], "To lower the need: a smaller bench.rows"),
    ):
        assert told in say("bench", "generate", *arguments, f"outputs={outputs}", code=2)
    assert 'Did you mean "train"?' in say("bench", "trian", "model=d2", code=2)
    assert "bench train takes no model" in say("bench", "train", "talks", f"outputs={outputs}", code=2)


# mlxchat doctor --gpu, here on the CPU's plain path in bfloat16


@pytest.mark.parametrize(("error", "code", "told"), [(0.0, 0, "ok  losses"), (0.1, 1, "FAIL  losses")])
def test_losses_are_compared_with_the_cpu(error, code, told, monkeypatch, command):
    losses = device_checks.losses
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(device_checks, "prepare_machine", lambda machine: None)  # it changes limits of this process
    monkeypatch.setattr(
        device_checks, "losses", lambda dtype: [loss + error * (dtype == mx.bfloat16) for loss in losses(dtype)]
    )
    ended, printed = command("doctor", "--gpu")
    assert (ended, told in printed) == (code, True), printed
