"""Checkpoints in mlx-lm: equal logits and answers; its programs train, fuse and generate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.artifacts import make_tokenizer
from kit.models import make_model
from mlxchat.data.tokenizer import render_for_completion
from mlxchat.engine.generate import Engine
from mlxchat.model.checkpoint import MODEL_FILE, save_checkpoint
from mlxchat.model.gpt import GPT

mlx_lm = pytest.importorskip("mlx_lm")


def saved(folder: Path, architecture: str, **sizes: Any) -> GPT:
    """Save a chat model of which no weight is zero, so that every part matters."""
    sizes = {"context_tokens": 512, **sizes}
    model = make_model(architecture, vocab_size=300, num_layers=4, width=64, scale=0.3, **sizes)
    save_checkpoint(folder, model, make_tokenizer(), {"stage": "sft", "format": "chat"})
    return model


# Windows are shorter than the rows. The second context is shorter than the input, of which long windows of July 2026
# must not see all.
@pytest.mark.parametrize("context_tokens", [512, 64])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_logits_agree_with_and_without_a_cache(tmp_path, architecture, context_tokens):
    from mlx_lm.models.cache import make_prompt_cache

    model = saved(tmp_path, architecture, context_tokens=context_tokens)
    theirs, _ = mlx_lm.load(str(tmp_path), trust_remote_code=architecture == "jul2026")
    ids = mx.array(np.random.default_rng(1).integers(0, model.sizes.vocab_size, (2, 300)))
    cache = make_prompt_cache(theirs)
    pieces = [theirs(ids[:, :200], cache), theirs(ids[:, 200:297], cache)]
    pieces += [theirs(ids[:, at : at + 1], cache) for at in range(297, 300)]
    for found in (theirs(ids), mx.concatenate(pieces, axis=1)):
        np.testing.assert_allclose(np.asarray(found), np.asarray(model(ids)), atol=1e-3)


@pytest.mark.parametrize("feature", [{"query_key_scale": 1.2}, {"window_pattern": "SL"}])
def test_unsupported_features_need_the_model_file(feature, tmp_path):
    """Neither adds parameters, so mlx-lm would load the model and compute something else."""
    model = saved(tmp_path, "oct2025", **feature)
    with pytest.raises(ValueError, match=MODEL_FILE):
        mlx_lm.load(str(tmp_path))
    theirs, _ = mlx_lm.load(str(tmp_path), trust_remote_code=True)
    ids = mx.array(np.random.default_rng(1).integers(0, model.sizes.vocab_size, (2, 300)))
    np.testing.assert_allclose(np.asarray(theirs(ids)), np.asarray(model(ids)), atol=1e-3)


@pytest.mark.slow
def test_programs_answer_as_we_do_train_and_fuse(tmp_path):
    """Adapters give the same greedy answer beside the model and within it."""
    question, tokenizer, folder = "How many windows?", make_tokenizer(), tmp_path / "model"
    folder.mkdir()
    model = saved(folder, "oct2025")
    (tmp_path / "chats").mkdir()
    chat = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Four."}]}
    for split in ("train", "valid", "test"):
        (tmp_path / "chats" / f"{split}.jsonl").write_text(4 * (json.dumps(chat) + "\n"))

    def run(program: str, *arguments: str | Path) -> str:
        command = [sys.executable, "-m", "mlx_lm", program, *map(str, arguments)]
        environ = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900, check=True).stdout

    def generate(model: Path, *more: str | Path) -> str:
        printed = run("generate", "--model", model, "--prompt", question, "--max-tokens", "12", "--temp", "0.0", *more)
        return printed.split("==========")[1].strip()

    prompt = render_for_completion(tokenizer, {"messages": chat["messages"][:1]})
    [ours] = Engine(model, tokenizer).complete([prompt], max_new_tokens=12)
    plain = generate(folder)
    assert plain == tokenizer.decode([token for token in ours.ids if token != tokenizer.assistant_end]).strip()
    run(
        "lora", "--model", folder, "--train", "--data", tmp_path / "chats", "--iters", "20", "--batch-size", "2",
        "--num-layers", "2", "--learning-rate", "1e-2", "--max-seq-length", "64", "--val-batches", "1",
        "--adapter-path", tmp_path / "adapters",
    )  # fmt: skip
    run("fuse", "--model", folder, "--adapter-path", tmp_path / "adapters", "--save-path", tmp_path / "fused")
    assert generate(tmp_path / "fused") == generate(folder, "--adapter-path", tmp_path / "adapters") != plain
