"""A model's weights as decoding reads them: fused, dealt to the cores, each part stored in the order of its product.

A step of decoding multiplies few rows with every weight once, so it is as fast as memory is read. Each lane
(`ops/lanes.py`) has some heads of every layer, a slice of each MLP and a slice of the vocabulary, and reads only these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlxchat.engine.quantise import Weight, stored
from mlxchat.model.gpt import GPT
from mlxchat.model.sizes import GPTSizes
from mlxchat.ops.device import backend

# Widths of parts are whole blocks of `quantise.stored`, unless there are fewer.
_MULTIPLE = 64


def lane_weights(model: GPT, lanes: int, bits: int | None = None, *, packed: bool = True) -> list[dict[str, Any]]:
    """Return what each lane reads: copies, which need the memory of all weights once more.

    Keys: 'layers', a list of dicts with 'qkv' (C → (H + 2 K) D) of the lane's heads, 'attention_out' (H D → C), 'up'
    (C → F), 'down' (F → C) and, if the layer has them, 'gate' (channels, K) and 'values' (V, K D); 'head' (C → V), the
    last lane's with zeros up to a whole block. A lane without heads lacks all that belongs to attention.

    Args:
        model: whose weights.
        lanes: how many share the work.
        bits: 8 or 4 quantises all matrices but embeddings and gates; None leaves them as they are.
        packed: whether quantised numbers stay packed, for the sake of memory; elsewhere than on a CPU they always do.
    """
    sizes = model.sizes
    store = partial(stored, bits=bits, packed=packed or backend() != "cpu")
    kv_heads = key_value_heads(sizes, lanes)
    inner, vocabulary = _deal(4 * sizes.width, lanes, _MULTIPLE), _deal(sizes.vocab_size, lanes, _MULTIPLE)
    parts = []
    for lane in range(lanes):
        layers = [_layer(model, index, kv_heads[lane], inner[lane], store) for index in range(sizes.num_layers)]
        parts.append({"layers": layers, "head": store(_whole_blocks(model.head_weight[vocabulary[lane]]))})
    mx.eval(parts)
    return parts


def key_value_heads(sizes: GPTSizes, lanes: int) -> list[slice]:
    """Return which key/value heads each lane has."""
    return _deal(sizes.num_kv_heads, lanes)


def _layer(model: GPT, index: int, kv: slice, inner: slice, store: Callable[[mx.array], Weight]) -> dict[str, Any]:
    sizes, block = model.sizes, model.transformer["h"][index]
    part = {
        "up": store(block.mlp.c_fc.matrix[inner]),
        "down": store(block.mlp.c_proj.matrix[:, inner]),
    }
    if kv.start == kv.stop:
        return part
    attention, group = block.attn, sizes.num_heads // sizes.num_kv_heads
    keys = slice(kv.start * sizes.head_width, kv.stop * sizes.head_width)
    queries = slice(keys.start * group, keys.stop * group)
    projections = ((attention.c_q, queries), (attention.c_k, keys), (attention.c_v, keys))
    fused = [layer.matrix[rows] for layer, rows in projections]
    part["qkv"] = store(mx.concatenate(fused))
    part["attention_out"] = store(attention.c_proj.matrix[:, queries])
    if sizes.has_value_embedding(index):
        part["gate"] = mx.contiguous(attention.ve_gate.weight[kv].T)
        part["values"] = mx.contiguous(model.value_embeds[str(index)].weight[:, keys])
    return part


def _whole_blocks(matrix: mx.array) -> mx.array:
    return mx.pad(matrix, [(0, -len(matrix) % _MULTIPLE), (0, 0)])


def _deal(count: int, lanes: int, multiple: int = 1) -> list[slice]:
    """Return parts of `count` things, as equal as whole multiples allow; some may be empty."""
    while multiple > 1 and count < lanes * multiple:
        multiple //= 2
    units = -(-count // multiple)
    borders = [min(count, units * lane // lanes * multiple) for lane in range(lanes + 1)]
    return [slice(start, stop) for start, stop in pairwise(borders)]
