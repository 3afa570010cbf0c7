"""Third-party models: our own checkpoint, opened by mlx-lm, has the results that it has with our code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="outside models need mlx-lm")


from kit.text import core_items, write_bundle
from kit.training import make_context
from mlxchat.config.schema import CoreConfig
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.engine.third_party import ThirdPartyEngine
from mlxchat.errors import DataError
from mlxchat.evals.bpb import text_loss
from mlxchat.evals.core import evaluate_core
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT

# mlx-lm adds 1e-5 where ours adds 1.2e-7 to the mean squares of its norms.
TOLERANCE = 2e-3


@pytest.fixture
def folder(model: GPT, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_checkpoint(path, model, tokenizer, {"format": "chat"})
    return path


@pytest.fixture
def engine(folder: Path) -> ThirdPartyEngine:
    return ThirdPartyEngine.load(folder)


def test_mlx_lm_has_our_results_on_core_letters_and_text(engine, model, tokenizer, tmp_path):
    kinds = {"choice": "multiple_choice", "schema": "schema", "language": "language_modeling"}
    write_bundle(tmp_path / "bundle", {label: (kind, 1, 0, core_items(kind, 9)) for label, kind in kinds.items()})

    def evaluate(engine: Any, work: str) -> dict[str, Any]:
        config = CoreConfig(bundle=str(tmp_path / "bundle"), long_prompts="cut")
        place = tmp_path / work
        return evaluate_core(make_context(place), engine, config, max_per_task=None, work=place / "core")[0]

    own = Engine(model, tokenizer, batch_tokens=400)
    engine.batch_tokens = 400
    assert evaluate(engine, "theirs") == evaluate(own, "ours")
    ids = np.array(tokenizer.encode("the cat sat on the mat and the dog " * 20)[:121], np.int32)
    texts = [(ids[start : start + 30], ids[start + 1 : start + 31]) for start in range(0, 90, 30)]
    prompts = [engine.render([{"role": "user", "content": f"the cat {number}"}]) for number in range(3)]
    letters = [each.letter_logits(prompts, ["AB"] * 3) for each in (engine, own)]
    np.testing.assert_allclose(letters[0], letters[1], atol=TOLERANCE)
    theirs = text_loss(engine.model, texts, engine.tokenizer.token_bytes, micro_tokens=64)
    ours = text_loss(model, texts, tokenizer.token_bytes, micro_tokens=64)
    assert (theirs.num_bytes, theirs.num_tokens) == (ours.num_bytes, ours.num_tokens)
    assert theirs.bits_per_byte == pytest.approx(ours.bits_per_byte, abs=TOLERANCE)


def test_tokenizer_read_by_transformers_is_ours(engine, tokenizer):
    theirs = engine.tokenizer
    assert (theirs.bos, theirs.vocab_size) == (tokenizer.bos, tokenizer.vocab_size)
    assert theirs.token_bytes.tolist() == tokenizer.token_bytes.tolist()
    for text in ("the cat sat", "  你好\n<|bos|> it's 1234"):
        assert theirs.encode(text.replace("<|bos|>", "")) == tokenizer.encode(text.replace("<|bos|>", ""))
        assert theirs.decode([*theirs.encode(text), theirs.vocab_size + 5]) == text
    assert theirs.encode("a\ud800b") == theirs.encode("a?b")
    messages = [{"role": "user", "content": "the cat"}]
    assert theirs.render(messages)[:2] == [tokenizer.bos, tokenizer.special_ids["<|user_start|>"]]


def test_answers_equal_those_of_our_engine(engine, model, tokenizer):
    prompts = [engine.render([{"role": "user", "content": text}]) for text in ("the cat", "the dog sat on the")]
    found = [each.complete(prompts, max_new_tokens=8) for each in (engine, Engine(model, tokenizer))]
    assert [row.ids for row in found[0]] == [row.ids for row in found[1]]


def test_code_of_the_folder_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "model.py"}))
    (folder / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="custom module"):
        ThirdPartyEngine.load(folder)
    assert not (tmp_path / "ran").exists()
