"""Exports for llama.cpp: one GGUF file with weights, tokenizer and chat template.

llama.cpp has no architecture of nanochat's name. Its `apertus` computes October 2025's model exactly, but for the soft
cap of the logits:

- The embedding is stored with every row RMS-normalised, since nanochat normalises after the look-up. All weights of
  norms are ones: nanochat's have none.
- nanochat rotates queries and keys by the negative angle: the halves of each head's rows in c_q and c_k are exchanged.
  Normalising before or after the rotation is the same, since a rotation keeps lengths.
- The MLP is ungated with xIELU: α_p x² + β x for x > 0, else α_n (expm1(min(x, ε)) − x) + β x. With α_p = 1, α_n = 0
  and β = 0 it is squared ReLU. ggml applies softplus to the stored α.

Without the soft cap greedy answers are equal, since tanh is monotone; sampled ones are a little more decided.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxchat.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from mlxchat.data.vocabulary import GPT2_PATTERN, GPT4_PATTERN
from mlxchat.errors import ConfigError
from mlxchat.interop.names import beyond_october
from mlxchat.interop.tensors import Floats
from mlxchat.model.gpt import RMS_NORM_EPSILON
from mlxchat.model.sizes import GPTSizes

if TYPE_CHECKING:
    from mlxchat.interop.exporting import Checkpoint

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types of matrices, by llama.cpp's names. Norms are always f32."""
_Q8_NUMBERS = 32
# Inverses of softplus at 1 and, nearly, at 0.
_ALPHA_ONE, _ALPHA_ZERO = math.log(math.e - 1.0), -1e9
_LAYER = {
    "attn.c_q": "attn_q", "attn.c_k": "attn_k", "attn.c_v": "attn_v", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
# In Go's template language; <|bos|> is added by llama.cpp.
_OLLAMA_TEMPLATE = (
    '{{- $system := .System }}{{ range .Messages }}{{ if eq .Role "user" }}<|user_start|>'
    '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}{{ .Content }}<|user_end|>'
    '{{ else if eq .Role "assistant" }}<|assistant_start|>{{ .Content }}<|assistant_end|>{{ end }}{{ end }}'
    "<|assistant_start|>"
)


def check_gguf(sizes: GPTSizes) -> None:
    """Raise a ConfigError unless llama.cpp can compute a model, or if the package gguf is missing."""
    if more := beyond_october(replace(sizes, vocab_multiple=1)):  # padded tables are no obstacle
        raise ConfigError(
            f"llama.cpp computes nanochat's model of October 2025, but not {', '.join(more)}. Use --to mlx (mlx-lm "
            "with --trust-remote-code), or train with architecture=oct2025"
        )
    if find_spec("gguf") is None:
        raise ConfigError("--to gguf needs the package gguf: pip install 'mlxchat[gguf]'")


def write_gguf(checkpoint: Checkpoint, out: Path, *, dtype: str = "f32") -> str:
    """Write a model as NAME-TYPE.gguf, and Ollama's Modelfile; return the file's name.

    `dtype`, one of TYPES, is of matrices. With q8_0 a matrix whose rows have no whole blocks of 32 is f16.
    """
    import gguf

    sizes = checkpoint.sizes
    file = out / f"{checkpoint.folder.name}-{dtype}.gguf"
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.APERTUS])
    writer.add_name(checkpoint.folder.name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_block_count(sizes.num_layers)
    writer.add_context_length(sizes.context_tokens)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(4 * sizes.width)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_vocab_size(sizes.padded_vocab_size)
    writer.add_layer_norm_rms_eps(RMS_NORM_EPSILON)
    writer.add_rope_dimension_count(sizes.head_width)
    writer.add_rope_freq_base(sizes.rope_theta)
    writer.add_xielu_alpha_p([_ALPHA_ONE] * sizes.num_layers)
    writer.add_xielu_alpha_n([_ALPHA_ZERO] * sizes.num_layers)
    writer.add_xielu_beta([0.0] * sizes.num_layers)
    writer.add_xielu_eps([-1e-6] * sizes.num_layers)
    _add_tokenizer(checkpoint, writer)
    for name, values in _tensors(checkpoint):
        has_blocks = dtype != "q8_0" or values.shape[-1] % _Q8_NUMBERS == 0
        kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else dtype.upper() if has_blocks else "F16"]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stop = f"PARAMETER stop {checkpoint.stop_token}\n"
    template = f'TEMPLATE """{_OLLAMA_TEMPLATE}"""\n' if checkpoint.chats else ""
    (out / "Modelfile").write_text(f"FROM ./{file.name}\n{template}{stop}", encoding="utf-8")
    return file.name


def describe_differences(tokenizer: Tokenizer) -> list[str]:
    """Return notes on what llama.cpp computes in another way."""
    cap = (
        "llama.cpp does not cap the logits: greedy answers are equal, sampled ones more decided. A temperature 1.1 "
        "times as high matches best."
    )
    if tokenizer.pattern in (GPT2_PATTERN, GPT4_PATTERN):
        return [cap]
    return [
        cap,
        "llama.cpp splits digits into groups of three, this tokenizer into groups of two: texts with numbers of three "
        "or more digits get other ids. tokenizer.pattern=gpt4 trains a tokenizer that it splits as mlxchat does.",
    ]


def _tensors(checkpoint: Checkpoint) -> list[tuple[str, Floats]]:
    """Return llama.cpp's tensors by name, float32: (rows, columns) of matrices, (width,) of norms."""
    sizes, weights = checkpoint.sizes, checkpoint.weights
    embedding = weights["transformer.wte.weight"].astype(np.float32)
    scale = np.sqrt((embedding**2).mean(axis=1, keepdims=True) + RMS_NORM_EPSILON)
    width, head = np.ones(sizes.width, np.float32), np.ones(sizes.head_width, np.float32)
    found = [("token_embd.weight", embedding / scale), ("output_norm.weight", width)]
    found.append(("output.weight", weights["lm_head.weight"].astype(np.float32)))
    for layer in range(sizes.num_layers):
        ones = {"attn_norm": width, "ffn_norm": width, "attn_q_norm": head, "attn_k_norm": head}
        found += [(f"blk.{layer}.{name}.weight", values) for name, values in ones.items()]
        for ours, theirs in _LAYER.items():
            matrix = weights[f"transformer.h.{layer}.{ours}.weight"].astype(np.float32)
            if theirs in ("attn_q", "attn_k"):
                halves = matrix.reshape(-1, 2, sizes.head_width // 2, sizes.width)  # (heads, halves, rows, columns)
                matrix = halves[:, ::-1].reshape(matrix.shape)
            found.append((f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(matrix)))
    return found


def _add_tokenizer(checkpoint: Checkpoint, writer: Any) -> None:
    """Add tokens, merges and template."""
    import gguf

    tokenizer, padded = checkpoint.tokenizer, checkpoint.sizes.padded_vocab_size
    vocabulary, merges = tokenizer.spelled()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    tokens += list(tokenizer.special_ids)
    kinds += [gguf.TokenType.CONTROL] * len(tokenizer.special_ids)
    kinds += [gguf.TokenType.UNUSED] * (padded - len(tokens))
    tokens += [f"<|unused_{number}|>" for number in range(padded - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if tokenizer.pattern == GPT2_PATTERN else "llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.special_ids[checkpoint.stop_token])
    writer.add_add_bos_token(True)
    if checkpoint.chats:
        # Marks of trained tokens, which llama.cpp's templates lack.
        writer.add_chat_template(CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
