"""Third-party models: our own checkpoint, opened by mlx-lm, has the results that it has with our code."""

import json
import random
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="outside models need mlx-lm")

from kit.text import core_items, write_bundle
from kit.training import make_context
from mlxchat.config.schema import CoreConfig
from mlxchat.data.packing import RowStream, take_validation
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import Documents
from mlxchat.engine.generate import Engine, ShownText
from mlxchat.engine.third_party import ThirdPartyEngine, ThirdPartyTokenizer
from mlxchat.errors import DataError
from mlxchat.evals.bpb import text_loss
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import evaluate_core
from mlxchat.evals.language_model import LanguageModel
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.tasks.base import Task

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


def test_mlx_lm_has_our_results_on_core_and_text(engine, model, tokenizer, tmp_path):
    kinds = {"choice": "multiple_choice", "schema": "schema", "language": "language_modeling"}
    write_bundle(tmp_path / "bundle", {label: (kind, 1, 0, core_items(kind, 9)) for label, kind in kinds.items()})

    def evaluate(engine: Any, work: str) -> dict[str, Any]:
        config = CoreConfig(bundle=str(tmp_path / "bundle"), long_prompts="cut")
        asked, place = LanguageModel(engine, batch_tokens=400), tmp_path / work
        return evaluate_core(make_context(place), asked, config, max_per_task=None, work=place / "core")[0]

    assert evaluate(engine, "theirs") == evaluate(Engine(model, tokenizer), "ours")
    ids = np.array(tokenizer.encode("the cat sat on the mat and the dog " * 20)[:121], np.int32)
    texts = [(ids[start : start + 30], ids[start + 1 : start + 31]) for start in range(0, 90, 30)]
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


@pytest.fixture
def sentencepiece() -> ThirdPartyTokenizer:
    """Return a tokenizer of pieces with byte fallback, which puts a blank before a text."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcé", "ab", "▁ab"]
    backend = Backend(models.BPE({piece: place for place, piece in enumerate(pieces)}, [("a", "b"), ("▁", "ab")],
                                 byte_fallback=True))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return ThirdPartyTokenizer(TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")))


def test_pieces_with_byte_fallback_have_bytes_and_answers_no_added_blank(sentencepiece):
    text = "ab abc é 你好\n"
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode_bytes([sentencepiece.bos, *ids]) == f" {text}".encode()
    assert (sentencepiece.token_bytes[ids].sum(), sentencepiece.token_bytes[sentencepiece.bos]) == (
        len(text.encode()) + 1,
        0,
    )
    shown = ShownText(sentencepiece, skip_blank=True)
    assert "".join(shown.add(id_) for id_ in ids) == text == sentencepiece.decode(ids)


class Letters(Task):
    """Two questions whose answer is the letter B."""

    name = "letters"
    kind = "categorical"
    chance = 0.5

    def _own_size(self) -> int:
        return 2

    def _conversation(self, index: int, rng: random.Random) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"the cat {index}"}, {"role": "assistant", "content": "B"}]
        return {"messages": messages, "letters": ["A", "B"], "answer": "B"}

    def evaluate(self, conversation: dict[str, Any], response: str) -> bool:
        return response == conversation["answer"]


ANSWERING = Answering(batch_rows=1, max_new_tokens=3)


def test_letters_are_chosen_by_their_logits(engine, tmp_path):
    score, rows = evaluate_task(
        make_context(tmp_path / "stage"),
        LanguageModel(engine),
        Letters("test"),
        ANSWERING,
        name="letters",
        work=tmp_path,
    )
    for row in rows:
        prompt = engine.render([{"role": "user", "content": f"the cat {row['index']}"}])
        logits = engine.model(mx.array([prompt]))[0, -1]
        a, b = (float(logits[engine.tokenizer.encode(letter)[0]]) for letter in "AB")
        assert row["output"] == ("B" if b > a else "A")
    assert score.accuracy == np.mean([row["output"] == "B" for row in rows])


def test_answers_equal_those_of_our_engine(engine, model, tokenizer):
    prompts = [engine.render([{"role": "user", "content": text}]) for text in ("the cat", "the dog sat on the")]
    ours = Engine(model, tokenizer).complete(prompts, max_new_tokens=8)
    assert [row.ids for row in engine.complete(prompts, max_new_tokens=8)] == [row.ids for row in ours]


def test_faulty_folders_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json"):
        ThirdPartyEngine.load(tmp_path / "empty")
    place, valid = folder / "tokenizer_config.json", json.loads((folder / "tokenizer_config.json").read_text())
    place.write_text(json.dumps({**valid, "model_max_length": "x"}))
    with pytest.raises(DataError, match="mlx-lm cannot open it"):
        ThirdPartyEngine.load(folder)
    place.write_text(json.dumps(valid))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        ThirdPartyEngine.load(folder)


def test_code_of_the_folder_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "model.py"}))
    (folder / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="custom module"):
        ThirdPartyEngine.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_pipeline_measures_a_folder_once(folder, model, tokenizer, mlxchat, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [{"text": f"The cat {number} sat on the mat and the dog sat on the log."} for number in range(300)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [
        "pipeline=outside", "outside.name=cat", f"outside.path={folder}", "outside.chat=false", "eval.bpb_tokens=2000",
        "corpus=files", f"corpus.paths=[{text}]", "machine=cpu", f"outputs={tmp_path / 'out'}",
    ]  # fmt: skip
    done = mlxchat(*settings)
    assert done.returncode == 0, done.stderr
    (scores,) = (tmp_path / "out" / "store").glob("outside-cat-*/scores.json")
    found = json.loads(scores.read_text())
    assert found["outside"] == {"name": "cat", "model_type": "nanochat", "context_tokens": 64}
    (tokens,) = (tmp_path / "out" / "store").glob("tokens-*")
    cursor = Documents([Path("validation")], lambda shard, is_awaited, check: tokens, once=True)
    rows = take_validation(
        RowStream("best_fit", cursor, row_tokens=64, buffer_size=1000), row_tokens=64, tokens=2000, setting=""
    )
    expected = text_loss(model, rows, tokenizer.token_bytes, micro_tokens=4096).bits_per_byte
    assert found["bpb"]["val"] == pytest.approx(expected, abs=TOLERANCE)
    moved = folder.rename(tmp_path / "moved")
    again = mlxchat("plan", *settings, f"outside.path={moved}")
    assert again.returncode == 0, again.stderr
    assert re.search(r"outside +done", again.stdout)
