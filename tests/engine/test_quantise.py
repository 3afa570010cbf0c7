"""Quantised weights: decoding, measured cost, refusal, memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kit.commands import clean_environment
from mlxchat.bench.timing import fill_zero_weights, random_rows
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.engine.quantise import PackedGPT, packed_copy
from mlxchat.errors import DataError
from mlxchat.evals.bpb import bits_per_byte
from mlxchat.evals.quantised import SAMPLE, check_quantised, measure_quantised
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT, flatten_parameters, init_weights, set_parameters
from mlxchat.terminal.chat import Chat


@pytest.fixture
def wide(model: GPT) -> GPT:
    """Return a model whose rows have whole groups also if divided over two lanes."""
    wide = GPT(replace(model.sizes, width=128, vocab_size=320))
    init_weights(wide, 0)
    fill_zero_weights(wide, 1)
    return wide


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_uses_the_quantised_weights(wide, tokenizer, bits):
    prompt = list(range(40))
    forward = Engine(wide, tokenizer, bits=bits).forward()
    forward.reserve(1, len(prompt))
    steps = [forward.step([token], [prompt[place - 1]], [place]) for place, token in enumerate(prompt)]
    wanted = np.asarray(packed_copy(wide, bits)(mx.array([prompt])))[0]
    # Float32 through three layers, other orders of summation.
    np.testing.assert_allclose(np.concatenate(steps), wanted, atol=2e-4)


def test_model_with_a_large_quantisation_error_is_refused(wide):
    rows, weights = random_rows(2, 32, 320, seed=0, batch=0), flatten_parameters(wide)
    with pytest.raises(DataError, match=r"weights of 4 bits change this model too much: .* nats per token"):
        check_quantised(wide, 4, rows, most=-1.0)
    set_parameters(wide, {"lm_head.weight": weights["lm_head.weight"] * float("nan")})
    with pytest.raises(DataError, match="weights of 8 bits change this model too much: the loss is not finite"):
        check_quantised(wide, 8, rows)


@pytest.mark.parametrize("bits", [8, 4])
def test_measured_cost_is_that_of_the_sample_text(wide, tokenizer, bits):
    """Against evals/bpb.py and NumPy's divergence, 1e-4."""
    packed, cost = measure_quantised(wide, tokenizer, bits)
    ids = np.array([tokenizer.bos, *tokenizer.encode(SAMPLE)][: wide.sizes.context_tokens + 1], dtype=np.int32)
    models = (wide, packed)
    losses = [bits_per_byte(each, [(ids[:-1], ids[1:])], tokenizer.token_bytes, micro_tokens=10_000) for each in models]
    logits = [np.asarray(each(mx.array(ids[None, :-1])))[0].astype(np.float64) for each in models]
    exact, rounded = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in logits)
    assert (cost.exact, cost.rounded) == pytest.approx(tuple(losses), rel=1e-4)
    assert cost.divergence == pytest.approx((np.exp(exact) * (exact - rounded)).sum(-1).mean(), abs=1e-4)
    assert not cost.bad
    assert str(cost).startswith(f"weights of {bits} bits: ")


@pytest.fixture
def saved(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> tuple[GPT, Path]:
    """Return a model of the tokenizer's vocabulary whose rows have whole groups, and its checkpoint."""
    wide = GPT(replace(model.sizes, width=128))
    init_weights(wide, 0)
    fill_zero_weights(wide, 1)
    save_checkpoint(tmp_path, wide, tokenizer, {"format": "chat"})
    return wide, tmp_path


def test_chat_prints_the_cost_of_quantised_weights(saved, tokenizer, capsys):
    chat = Chat.load(saved[1], temperature=0.0, top_k=None, max_tokens=4, seed=0, bits=4, kv_bits=8)
    chat.answer_once("the cat")
    assert capsys.readouterr().err == f"{measure_quantised(saved[0], tokenizer, 4)[1]}\n"
    assert isinstance(chat.engine.model, PackedGPT)
    assert chat.engine.kv_bits == 8


HELD = """
import gc, sys
from pathlib import Path
import mlx.core as mx
from mlxchat.terminal.chat import Chat

for time in range(2):  # the first time also creates compiled functions and constants
    chat = None
    gc.collect()
    before = mx.get_active_memory()
    chat = Chat.load(Path(sys.argv[1]), temperature=0.0, top_k=None, max_tokens=4, seed=0, bits=4)
    chat.answer_once("the cat")
    gc.collect()
print("held", mx.get_active_memory() - before)
"""


def test_original_weights_are_freed(path, saved):
    """Matrices of 4 bits take 5/32 of float32's bytes; embeddings, a KV cache and, on a CPU, the decoder's copy of the
    packed matrices are also in memory."""
    own = sum(value.nbytes for value in flatten_parameters(saved[0]).values())
    done = subprocess.run(
        [sys.executable, "-c", HELD, saved[1]], env=clean_environment(MLXCHAT_CPU=path if path == "plain" else ""),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    held = int(done.stdout.rpartition("held ")[2])
    assert held < (0.3 if path == "plain" else 0.7) * own
