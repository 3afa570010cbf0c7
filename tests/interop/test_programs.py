"""Other programs give our answers on exported models.

nanochat's engine runs where torch is installed and MLXCHAT_NANOCHAT names a checkout of nanochat, of October 2025
(dfc8833) or July 2026 (92d63d4).
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from kit.artifacts import make_model, make_tokenizer, publish
from kit.commands import run_here
from mlxchat.data.conversation import render_for_completion
from mlxchat.engine.generate import Engine
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
QUESTION = "How many windows?"
ANSWER_TOKENS = 12


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("programs") / "outputs"
    for name, architecture in (("oct", "oct2025"), ("jul", "jul2026")):
        model, tokenizer = make_model(architecture), make_tokenizer()
        facts = {"stage": "sft", "format": "chat"}
        publish(found, name, partial(save_checkpoint, model=model, tokenizer=tokenizer, facts=facts))
    return found


@pytest.fixture(scope="module")
def folder(outputs: Path) -> Path:
    """The model for mlx-lm, with data for its trainer beside it."""
    pytest.importorskip("mlx_lm")
    assert run_here("export", "oct", "--to", "mlx", outputs.parent / "model", f"outputs={outputs}") == 0
    (outputs.parent / "chats").mkdir()
    chat = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Four."}]}
    for split in ("train", "valid", "test"):
        (outputs.parent / "chats" / f"{split}.jsonl").write_text(4 * (json.dumps(chat) + "\n"))
    return outputs.parent / "model"


def answer_of_ours(outputs: Path, name: str) -> str:
    model, tokenizer, _ = load_checkpoint(resolve(Store(outputs), name))
    prompt = render_for_completion(tokenizer, {"messages": [{"role": "user", "content": QUESTION}]})
    [found] = Engine(model, tokenizer).complete([prompt], max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    return tokenizer.decode([token for token in found.ids if token != tokenizer.assistant_end])


def run(program: str, *arguments: str | Path) -> str:
    """Run one of mlx-lm's programs without a network; return what it printed, without colours."""
    command = [sys.executable, "-m", "mlx_lm", program, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}, capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)


def generate(model: Path, *more: str | Path) -> str:
    arguments = ["--model", model, "--prompt", QUESTION, "--max-tokens", str(ANSWER_TOKENS), "--temp", "0.0", *more]
    return run("generate", *arguments).split("==========")[1].strip("\n")


def test_mlx_lm_answers_as_we_do_trains_and_fuses(folder, outputs, tmp_path):
    """Adapters give the same greedy answer beside the model and within it."""
    assert generate(folder).strip() == answer_of_ours(outputs, "oct").strip()
    run(
        "lora", "--model", folder, "--train", "--data", folder.parent / "chats", "--iters", "20", "--batch-size", "2",
        "--num-layers", "2", "--learning-rate", "1e-2", "--max-seq-length", "64", "--val-batches", "1",
        "--adapter-path", tmp_path / "adapters",
    )  # fmt: skip
    run("fuse", "--model", folder, "--adapter-path", tmp_path / "adapters", "--save-path", tmp_path / "fused")
    beside = generate(folder, "--adapter-path", tmp_path / "adapters")
    assert generate(tmp_path / "fused") == beside
    assert beside != generate(folder)


_NANOCHAT = """
import json, sys
import torch
from nanochat.checkpoint_manager import build_model, find_last_step
from nanochat.engine import Engine

folder, question, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, tokenizer, _ = build_model(folder, find_last_step(folder), torch.device("cpu"), "eval")
messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
prompt = tokenizer.render_for_completion({"messages": messages})
(ids,), _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=tokens, temperature=0.0)
print("ANSWER " + json.dumps(tokenizer.decode(ids[len(prompt):])))
"""


def test_nanochats_engine_answers_as_we_do(outputs, tmp_path):
    pytest.importorskip("torch")
    checkout = os.environ.get("MLXCHAT_NANOCHAT")
    if checkout is None:
        pytest.skip("MLXCHAT_NANOCHAT names no checkout of nanochat")
    name = "jul" if (Path(checkout) / "nanochat" / "optim.py").exists() else "oct"
    assert run_here("export", name, "--to", "nanochat", tmp_path / "out", f"outputs={outputs}") == 0
    done = subprocess.run(
        [sys.executable, "-c", _NANOCHAT, str(tmp_path / "out"), QUESTION, str(ANSWER_TOKENS)],
        env=os.environ | {"PYTHONPATH": checkout, "NANOCHAT_BASE_DIR": str(tmp_path / "out")},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.split("ANSWER ")[1])
    assert found == answer_of_ours(outputs, name)
