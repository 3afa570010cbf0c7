"""mlxchat export ID --to hf|nanochat|mlx PATH, checked with the other tool; mlx-lm on our checkpoints."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml

from kit import models
from kit.artifacts import FACTS, make_model, publish, some_ids
from kit.commands import Command
from kit.models import make_tokenizer
from mlxchat.data.tokenizer import render_conversation, render_for_completion
from mlxchat.engine.generate import Engine
from mlxchat.interop import exporting
from mlxchat.model import gpt
from mlxchat.model.checkpoint import MODEL_FILE, computes_as_published, load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, set_parameters
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

# The Hub's client says this to itself.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
HOSTILE = "x\n---\nlicense: mit\n<script>alert(1)</script>\n# {{ 7 * 7 }} | `rm` \u202e\x1b[2J"


def publish_model(outputs: Path, name: str, architecture: str, **sizes: Any) -> Path:
    """Publish a checkpoint whose manifest holds hostile text, and return its folder."""
    model, tokenizer = make_model(architecture, **sizes), make_tokenizer()
    return publish(
        outputs, name, lambda out: save_checkpoint(out, model, tokenizer, FACTS),
        config={"sft": {"mixture": HOSTILE}},
        full_config={"sft": {"note": HOSTILE, "path": "/home/somebody/mine.jsonl"}},
        externals=[{"url": "hf://models/karpathy/nanochat-d32/model_000650.pt", "licence": "MIT"},
                   {"url": "/home/somebody/tokenizer.pkl", "sha256": "0" * 64},
                   {"url": "hf://datasets/openai/gsm8k/main.parquet", "licence": "MIT", "name": HOSTILE},
                   {"url": f"hf://datasets/evil/{HOSTILE}/x", "licence": HOSTILE}],
    )  # fmt: skip


@pytest.fixture
def mlx_lm() -> Any:
    return pytest.importorskip("mlx_lm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("export") / "outputs"
    publish_model(outputs, "oct", "oct2025")
    publish_model(outputs, "jul", "jul2026")
    publish_model(outputs, "odd", "oct2025", rope_theta=5000.0)
    return outputs


@pytest.fixture
def export(made: Path, command: Command) -> Callable[..., tuple[int, str]]:
    """Run the verb in this process; return its exit code and all that it said."""
    return lambda *arguments: command("export", *arguments, f"outputs={made}")


def artifact(made: Path, name: str) -> Path:
    return resolve(Store(made), name)


@pytest.mark.parametrize(("name", "bits"), [("oct", None), ("jul", None), ("oct", 8), ("jul", 4)])
def test_mlx_export_has_our_logits_in_mlx_lm(mlx_lm, export, made, tmp_path, name, bits):
    code, said = export(name, "--to", "mlx", tmp_path / "out", *(["--bits", bits] if bits else []))
    assert code == 0
    assert ("--trust-remote-code" in said) == (name == "jul")
    assert (f"Its weights were rounded to {bits} bits." in said) == bool(bits)
    model, words = mlx_lm.load(str(tmp_path / "out"), trust_remote_code=name == "jul")
    ours, tokenizer, _ = load_checkpoint(artifact(made, name))
    weights = flatten_parameters(ours)
    for key, value in weights.items():  # rounded as MLX's quantisation is documented, by NumPy
        group = next((each for each in (64, 32) if value.ndim == 2 and value.shape[1] % each == 0), None)
        if bits and group is not None:
            packed = mx.quantize(value, group_size=group, bits=bits)
            weights[key] = mx.dequantize(*packed, group_size=group, bits=bits)
    set_parameters(ours, weights)
    ids = np.asarray(some_ids())
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), np.asarray(ours(mx.array(ids))), atol=1e-3)
    messages = [{"role": "user", "content": "Why?\n"}]
    expected = render_for_completion(tokenizer, {"messages": messages})
    assert list(words.apply_chat_template(messages, add_generation_prompt=True)) == list(expected)


def test_transformers_computes_our_logits_prompts_and_masks(export, made, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert export("oct", "--to", "hf", tmp_path / "out")[0] == 0
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "out")).__name__ == "NanoChatConfig"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_checkpoint(artifact(made, "oct"))[1]
    said = ("system", "Be brief."), ("user", "It isn't 12!\n"), ("assistant", "Yes."), ("user", "More")
    messages = [{"role": role, "content": text} for role, text in said]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(found) == render_for_completion(ours, {"messages": messages})
    # TRL trains on this mask (assistant_only_loss): the same tokens as our own mask.
    messages.append({"role": "assistant", "content": "No."})
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = render_conversation(ours, {"messages": messages})
    assert (list(found["input_ids"]), list(found["assistant_masks"])) == (list(ids), list(mask))
    # Pipelines pad batches; without a pad token they refuse.
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id == tokenizer.eos_token_id == ours.assistant_end
    torch = pytest.importorskip("torch")
    ids = np.asarray(some_ids())
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor(ids)).logits
    expected = load_checkpoint(artifact(made, "oct"))[0](mx.array(ids))
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["jul", "--to", "hf", "OUT"], "value embeddings, residual scalars, the smear, the backout.*--to mlx"),
        (["oct", "--to", "onnx", "OUT"], "--to: invalid choice: 'onnx'"),
        (["jul", "--to", "gguf", "OUT"], "but not value embeddings.*Use --to mlx"),
        (["jul", "--to", "mlx", "OUT", "--dtype", "q8_0"], "expected float32, bfloat16 with --to mlx"),
        (["oct", "OUT"], "required: --to"),
        (["odd", "--to", "nanochat", "OUT"], r"rope_theta 5000\.0 instead of 10000\.0.*--to mlx or --to hf"),
        (["oct", "--to", "hf", "OUT", "--bits", "4"], "--bits requires --to mlx"),
        (["oct", "--to", "nanochat", "OUT", "--dtype", "bfloat16"], "--to nanochat has fixed types"),
    ],
)
def test_invalid_exports_write_nothing(export, tmp_path, arguments, told):
    place = tmp_path / "out"
    code, said = export(*(each.replace("OUT", str(place)) for each in arguments))
    assert code == 2
    assert re.search(told, " ".join(said.split())), said
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_only_with_force(export, tmp_path):
    place = tmp_path / "out"
    place.mkdir()
    assert export("oct", "--to", "hf", place)[0] == 0  # an empty folder is nobody's
    (place / "mine.txt").write_text("kept")
    code, said = export("oct", "--to", "mlx", place)
    assert (code, (place / "mine.txt").read_text()) == (2, "kept")
    assert "--force" in said
    assert export("oct", "--to", "mlx", place, "--force")[0] == 0
    assert not (place / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_card_has_provenance_and_escapes_text(export, made, tmp_path):
    export("oct", "--to", "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    start, front, body = card.split("---\n", 2)
    assert start == ""
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["nanochat", "mlxchat", "conversational"], "datasets": ["openai/gsm8k"],
        "base_model": ["karpathy/nanochat-d32"], "language": "en",
    }  # fmt: skip
    place = artifact(made, "oct")
    manifest = json.loads((place / "manifest.json").read_text())
    (weights,) = [file for file in manifest["outputs"] if file["path"] == "model.safetensors"]
    assert manifest["rid"] in body
    assert weights["sha256"] in body
    assert "mine.jsonl" in body
    assert "somebody" not in card
    outside_of_code = re.sub(r"```text\n.*?\n```", "", body, flags=re.DOTALL)
    assert "<script>" not in outside_of_code
    assert "\n---\n" not in body
    assert not {"\x1b", "\u202e"} & set(card)


def test_push_creates_a_private_repository_with_one_commit(export, upload_hub, made, tmp_path, monkeypatch):
    """By plain HTTP: hf_xet retries silently for minutes where Xet storage does not answer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    code, said = export("oct", "--to", "mlx", tmp_path / "out", "--hub", "me/model")
    assert code == 0, said
    repository = upload_hub.repositories["me/model"]
    assert repository.private
    assert repository.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "mlx_lm.generate --model me/model --prompt" in repository.files["README.md"].decode()
    (message,) = repository.commits
    assert json.loads((artifact(made, "oct") / "manifest.json").read_text())["rid"] in message
    assert upload_hub.token not in said
    assert not [path for _, path in upload_hub.log if "xet" in path]
    assert " to me/model" in said


@pytest.mark.parametrize(("name", "target"), [("oct", "hf"), ("jul", "nanochat")])
def test_model_of_a_changed_forward_pass_is_not_exported(export, tmp_path, monkeypatch, name, target):
    """Bug: after gpt.py's activation was changed, exports were written as nanochat's model."""
    monkeypatch.setattr(gpt, "squared_relu", nn.silu)
    monkeypatch.setattr(exporting, "computes_as_published", computes_as_published.__wrapped__)  # not cached
    code, said = export(name, "--to", target, tmp_path / "out")
    assert code == 2
    assert "computes other logits than nanochat's architecture" in said or "does not support" in said
    assert not (tmp_path / "out").exists()


def saved(folder: Path, architecture: str, **sizes: Any) -> GPT:
    """Save a chat model of which no weight is zero, so that every part matters."""
    sizes = {"context_tokens": 512, **sizes}
    model = models.make_model(architecture, num_layers=4, width=64, scale=0.3, **sizes)
    save_checkpoint(folder, model, make_tokenizer(), FACTS)
    return model


# Windows are shorter than the rows. The second context is shorter than the input, of which long windows of July 2026
# must not see all.
@pytest.mark.parametrize("context_tokens", [512, 64])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_logits_agree_with_and_without_a_cache(mlx_lm, tmp_path, architecture, context_tokens):
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
def test_unsupported_features_need_the_model_file(mlx_lm, feature, tmp_path):
    """Neither adds parameters, so mlx-lm would load the model and compute something else."""
    model = saved(tmp_path, "oct2025", **feature)
    with pytest.raises(ValueError, match=MODEL_FILE):
        mlx_lm.load(str(tmp_path))
    theirs, _ = mlx_lm.load(str(tmp_path), trust_remote_code=True)
    ids = mx.array(np.random.default_rng(1).integers(0, model.sizes.vocab_size, (2, 300)))
    np.testing.assert_allclose(np.asarray(theirs(ids)), np.asarray(model(ids)), atol=1e-3)


@pytest.mark.slow
def test_programs_answer_as_we_do_train_and_fuse(mlx_lm, tmp_path):
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
