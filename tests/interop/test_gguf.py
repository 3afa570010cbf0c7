"""export --to gguf: what is in the file computes our model as llama.cpp's apertus does, and llama.cpp itself agrees."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.artifacts import FACTS, make_model, publish, publish_base
from kit.commands import Command
from kit.models import make_tokenizer
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.vocabulary import GPT4_PATTERN
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT

gguf = pytest.importorskip("gguf")

Array = np.ndarray[Any, np.dtype[Any]]
IDS = [275, 3, 97, 200, 12, 150, 7, 97]
CAP = 15.0


def exported(command: Command, outputs: Path, *options: str) -> Path:
    code, text = command("export", "oct", "--to", "gguf", str(outputs / "made"), *options, f"outputs={outputs}")
    assert code == 0, text
    (file,) = (outputs / "made").glob("*.gguf")
    return file


def apertus(file: Path, ids: list[int]) -> Array:
    """Return the logits (T, V) that a file stands for, in float64, as llama.cpp defines its architecture apertus."""
    reader = gguf.GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    weights = {each.name: gguf.quants.dequantize(each.data, each.tensor_type).astype(np.float64)
               for each in reader.tensors}  # fmt: skip
    heads, kv_heads = facts["apertus.attention.head_count"], facts["apertus.attention.head_count_kv"]
    size, base = facts["apertus.rope.dimension_count"], facts["apertus.rope.freq_base"]
    eps = facts["apertus.attention.layer_norm_rms_epsilon"]

    def norm(x: Array, name: str) -> Array:
        scaled: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]
        return scaled

    def rotate(x: Array) -> Array:
        angle = np.outer(np.arange(len(x)), base ** (-np.arange(size // 2) * 2 / size))[:, None]
        x1, x2 = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([x1 * np.cos(angle) - x2 * np.sin(angle), x2 * np.cos(angle) + x1 * np.sin(angle)], -1)

    def xielu(x: Array, layer: int) -> Array:
        alpha_p, alpha_n = (np.logaddexp(0, facts[f"xielu.alpha_{sign}"][layer]) for sign in "pn")
        beta, epsilon = facts["xielu.beta"][layer], facts["xielu.eps"][layer]
        negative = (np.expm1(np.minimum(x, epsilon)) - x) * alpha_n + beta * x
        return np.where(x > 0, alpha_p * x**2 + beta * x, negative)

    x = weights["token_embd.weight"][ids]
    for layer in range(facts["apertus.block_count"]):
        at = f"blk.{layer}."

        def project(y: Array, name: str, at: str = at) -> Array:
            return y @ weights[f"{at}{name}.weight"].T

        y = norm(x, f"{at}attn_norm")
        q = rotate(norm(project(y, "attn_q").reshape(len(ids), heads, size), f"{at}attn_q_norm"))
        k = rotate(norm(project(y, "attn_k").reshape(len(ids), kv_heads, size), f"{at}attn_k_norm"))
        v = project(y, "attn_v").reshape(len(ids), kv_heads, size)
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + project(np.einsum("hts,shd->thd", shares, v).reshape(len(ids), -1), "attn_output")
        x = x + project(xielu(project(norm(x, f"{at}ffn_norm"), "ffn_up"), layer), "ffn_down")
    return norm(x, "output_norm") @ weights["output.weight"].T


def uncapped(model: GPT, ids: list[int]) -> Array:
    logits = np.asarray(model(mx.array([ids]))[0], dtype=np.float64)
    return CAP * np.arctanh(logits / CAP)


@pytest.mark.parametrize(("options", "tolerance"), [((), 1e-4), (("--dtype", "f16"), 0.02), (("--dtype", "q8_0"), 0.2)])
def test_file_computes_the_model_without_its_soft_cap(options, tolerance, command, tmp_path):
    """Tolerances of logits about 2 in size: float32; 11 bits per weight; 8 bits per weight and a scale per 32."""
    folder = publish_base(tmp_path, "oct")
    found = apertus(exported(command, tmp_path, *options), IDS)
    expected = uncapped(load_checkpoint(folder)[0], IDS)
    assert np.abs(found[:, : expected.shape[1]] - expected).max() < tolerance
    assert np.abs(expected).max() > 1


def test_file_has_our_tokens_template_and_stop(command, tmp_path):
    publish_base(tmp_path, "oct")
    file, tokenizer = exported(command, tmp_path), make_tokenizer()
    facts = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    assert [tokens.index(name) for name in tokenizer.special_ids] == list(tokenizer.special_ids.values())
    assert {kinds[id_] for id_ in tokenizer.special_ids.values()} == {gguf.TokenType.CONTROL}
    assert tokens[tokenizer.encode(" the")[0]].startswith("Ġ")
    assert len(tokens) == facts["apertus.vocab_size"]
    assert tokens[facts["tokenizer.ggml.eos_token_id"]] == "<|assistant_end|>"
    assert "generation" not in facts["tokenizer.chat_template"].replace("add_generation_prompt", "")
    modelfile = (file.parent / "Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./{file.name}\n")
    assert modelfile.endswith("PARAMETER stop <|assistant_end|>\n")
    assert f"llama-server -m FOLDER/{file.name}" in (file.parent / "README.md").read_text()


LLAMA = """
import json, sys, urllib.request
import xllamacpp
file, prompt, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.fit_params = file, 64, 1, False, False
server = xllamacpp.Server(params)
body = {"prompt": prompt, "n_predict": 8, "temperature": 0, "n_probs": 5}
answer = server.handle_completions(body)
answer = answer[0] if isinstance(answer, list) else answer
def encode(text):
    request = urllib.request.Request(f"{server.listening_address}/tokenize", json.dumps({"content": text}).encode())
    request.add_header("Content-Type", "application/json")
    return json.loads(urllib.request.urlopen(request).read())["tokens"]
print("RESULT" + json.dumps([answer["choices"][0]["logprobs"]["content"], [encode(text) for text in texts]]))
"""


@pytest.mark.slow
def test_llama_cpp_gives_the_same_tokens_and_probabilities(command, tmp_path):
    pytest.importorskip("xllamacpp")
    tokenizer = train_tokenizer(["the cat sat on the mat, 12345 times; " * 5], 280, GPT4_PATTERN)
    folder = publish(tmp_path, "oct", lambda out: save_checkpoint(out, make_model(), tokenizer, FACTS))
    texts = ["the cat 12345 007", "It's\n\n  über 🙂\t", "a\r\n1 22 333 4444"]
    done = subprocess.run(
        [sys.executable, "-c", LLAMA, str(exported(command, tmp_path)), json.dumps(IDS), json.dumps(texts)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    tokens, encoded = json.loads(done.stdout.partition("RESULT")[2].splitlines()[0])
    assert encoded == [tokenizer.encode(text) for text in texts]
    model, ids = load_checkpoint(folder)[0], list(IDS)
    for token in tokens:
        logits = uncapped(model, ids)[-1]
        logprobs = logits - np.logaddexp.reduce(logits)
        assert token["id"] == logits.argmax()
        for top in token["top_logprobs"]:
            assert abs(top["logprob"] - logprobs[top["id"]]) < 0.005, "llama.cpp computes with f16 caches"
        ids.append(token["id"])
