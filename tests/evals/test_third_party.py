"""Third-party models: our own checkpoint, opened by mlx-lm, has the results that it has with our code."""

import importlib
import io
import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="outside models need mlx-lm")

from kit.text import core_items, write_bundle
from mlxchat.data.packing import DocumentRows, take_rows
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.tokens import Documents
from mlxchat.engine.generate import Engine
from mlxchat.engine.scheduler import Request, ShownText
from mlxchat.engine.third_party import ThirdPartyEngine, ThirdPartyTokenizer
from mlxchat.errors import DataError
from mlxchat.evals.bpb import text_loss
from mlxchat.evals.branching import Continuation, make_rows
from mlxchat.evals.chat import Answering, evaluate_task
from mlxchat.evals.core import evaluate_core
from mlxchat.evals.language_model import LanguageModel, OwnModel
from mlxchat.evals.third_party import ThirdPartyModel
from mlxchat.model.checkpoint import save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.runner.progress import Progress
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


@pytest.fixture
def outside(engine: ThirdPartyEngine) -> tuple[ThirdPartyModel, ThirdPartyTokenizer]:
    return ThirdPartyModel(engine.model, engine.context_tokens), engine.tokenizer


def test_mlx_lm_has_our_results_on_core_and_text(outside, model, tokenizer, tmp_path):
    kinds = {"choice": "multiple_choice", "schema": "schema", "language": "language_modeling"}
    write_bundle(tmp_path / "bundle", {label: (kind, 1, 0, core_items(kind, 9)) for label, kind in kinds.items()})

    def evaluate(model: LanguageModel, tokenizer: Any, work: str) -> dict[str, Any]:
        return evaluate_core(
            model, tokenizer, tmp_path / "bundle", max_per_task=None, tasks=None, long_prompts="cut", batch_tokens=400,
            work=tmp_path / work, progress=lambda total, unit: Progress("core", total, unit, stream=io.StringIO()),
        ).to_dict()  # fmt: skip

    assert evaluate(*outside, "theirs") == evaluate(OwnModel(model), tokenizer, "ours")
    ids = np.array(tokenizer.encode("the cat sat on the mat and the dog " * 20)[:121], np.int32)
    texts = [(ids[start : start + 30], ids[start + 1 : start + 31]) for start in range(0, 90, 30)]
    theirs = text_loss(outside[0], texts, outside[1].token_bytes, micro_tokens=64)
    ours = text_loss(model, texts, tokenizer.token_bytes, micro_tokens=64)
    assert (theirs.num_bytes, theirs.num_tokens) == (ours.num_bytes, ours.num_tokens)
    assert theirs.bits_per_byte == pytest.approx(ours.bits_per_byte, abs=TOLERANCE)


def test_tokenizer_read_by_transformers_is_ours(outside, tokenizer):
    theirs = outside[1]
    assert (theirs.bos, theirs.vocab_size) == (tokenizer.bos, tokenizer.vocab_size)
    assert theirs.token_bytes.tolist() == tokenizer.token_bytes.tolist()
    for text in ("the cat sat", "  你好\n<|bos|> it's 1234"):
        assert theirs.encode(text.replace("<|bos|>", "")) == tokenizer.encode(text.replace("<|bos|>", ""))
        assert theirs.decode([*theirs.encode(text), theirs.vocab_size + 5]) == text
    assert theirs.encode("a\ud800b") == theirs.encode("a\ufffdb")
    messages = [{"role": "user", "content": "the cat"}]
    assert theirs.render(messages)[:2] == [tokenizer.bos, tokenizer.special_ids["<|user_start|>"]]


def sentencepiece(scheme: str) -> ThirdPartyTokenizer:
    """Return a tokenizer of pieces with byte fallback; `scheme` says where a blank is put before a text."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcé", "ab", "▁ab"]
    backend = Backend(models.BPE({piece: place for place, piece in enumerate(pieces)}, [("a", "b"), ("▁", "ab")],
                                 byte_fallback=True))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return ThirdPartyTokenizer(TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")))


def test_bytes_of_pieces_with_byte_fallback():
    tokenizer, text = sentencepiece("never"), "ab abc é 你好\n"
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.token_bytes[tokenizer.bos] == 0
    assert tokenizer.decode_bytes([tokenizer.bos, *tokenizer.encode(text)]) == text.encode()


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_answers_begin_without_an_added_blank(scheme):
    """Answers are shown token by token, and their first one is "▁ab" where decoding the whole gives "ab"."""
    tokenizer = sentencepiece(scheme)
    ids = tokenizer.encode(" ab ab" if scheme == "never" else "ab ab")
    shown = ShownText(tokenizer, skip_blank=tokenizer.skips_blank)
    assert "".join(shown.add(id_) for id_ in ids) == tokenizer.decode(ids)
    assert tokenizer.skips_blank == (scheme == "always")


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
    score, rows = evaluate_task(engine, Letters("test"), ANSWERING, work=tmp_path / "work")
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
    scheduler = engine.scheduler(max_rows=2)
    ids = [scheduler.submit(Request(prompt=prompt, max_new_tokens=8, tools=False)) for prompt in prompts]
    said: dict[int, list[int | None]] = {id_: [] for id_ in ids}
    while not scheduler.idle:
        for event in scheduler.step():
            said[event.id].append(event.token)
    assert [said[id_] for id_ in ids] == [row.ids for row in ours]


def test_hf_export_has_equal_logits(model, folder, outside, tmp_path):
    """mlx-lm has other names of nanochat's parameters; the error ended where their list began."""
    from mlxchat.interop import exporting

    checkpoint = exporting.open_checkpoint(folder)
    (tmp_path / "hf").mkdir()
    exporting.write_hf(checkpoint, tmp_path / "hf")
    exported = ThirdPartyEngine.load(tmp_path / "hf")
    tokenizer = exported.tokenizer
    ids = mx.array([[tokenizer.bos, *tokenizer.encode("the cat sat on the mat")]])
    assert np.array_equal(np.asarray(exported.model(ids)), np.asarray(outside[0](ids)))
    assert tokenizer.has_chat_template


def test_terminal_reports_dropped_turns(folder, capsys):
    """The context was cut without a word."""
    from mlxchat.terminal.chat import Chat

    settings: dict[str, Any] = {"temperature": 0.0, "top_k": None, "max_tokens": 8, "seed": 0}
    chat = Chat.load_third_party(folder, "theirs", **settings)
    chat.ask("the cat")
    assert capsys.readouterr().err == ""
    chat.ask("1 2 3 4 5 " * 30)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert lines[0].startswith("left out the oldest turn: the model reads 64 tokens, of which 8 are for the answer")
    assert lines[1].endswith(
        "tokens of the question: the model reads 64 tokens, of which 8 are for the answer (--max-tokens)"
    )
    assert len(chat.messages) == 4


def test_top_k_beyond_the_vocabulary_leaves_every_token(folder, capsys):
    """The default of 50 ended in a traceback of mlx-lm where the vocabulary was smaller."""
    from mlxchat.terminal.chat import Chat

    answers = []
    for top_k in (100_000, None):
        settings: dict[str, Any] = {"temperature": 1.0, "top_k": top_k, "max_tokens": 8, "seed": 0}
        Chat.load_third_party(folder, "theirs", **settings).ask("the cat")
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_warnings_have_no_control_characters(folder):
    """Its warning about an unknown kind of rotary embedding brought OSC 52 to the terminal."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "a\x1b]52;c;aGFsbG8=\x07"}
    (folder / "config.json").write_text(json.dumps(config))
    handler = logging.StreamHandler(screen := io.StringIO())
    transformers.logging.add_handler(handler)
    try:
        ThirdPartyEngine.load(folder)
    finally:
        transformers.logging.remove_handler(handler)
    assert "aGFsbG8" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


def test_faulty_folders_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json"):
        ThirdPartyEngine.load(tmp_path / "empty")
    place, valid = folder / "tokenizer_config.json", json.loads((folder / "tokenizer_config.json").read_text())
    place.write_text(json.dumps({**valid, "model_max_length": "x"}))
    with pytest.raises(DataError, match="mlx-lm cannot open it"):
        ThirdPartyEngine.load(folder)
    place.write_text(json.dumps({**valid, "chat_template": "{{ '' }}"}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match="renders this conversation as empty text"):
        ThirdPartyEngine.load(folder).render([{"role": "user", "content": "a"}])
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


OTHERS = {
    "gpt2": {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5,
             "vocab_size": 80},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
              "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 80},
    "mamba": {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "state_size": 4, "num_hidden_layers": 2,
              "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(OTHERS))
def test_rows_equal_single_sequences_in_other_architectures(kind):
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {"model_type": kind, **OTHERS[kind]}
    mx.random.seed(3)
    inner = module.Model(module.ModelArgs.from_dict(config))
    model, rng = ThirdPartyModel(inner, 2048), np.random.default_rng(0)
    groups = []
    for _ in range(5):
        shared = rng.integers(0, 80, 12 + int(rng.integers(0, 4))).tolist()
        groups.append([Continuation(shared + rng.integers(0, 80, size).tolist(), len(shared)) for size in (1, 4, 9)])
    rows = make_rows(groups, 1000)
    for row, found, likeliest in zip(rows, model.losses(rows), model.predictions(rows), strict=True):
        for got, ids, each in zip(found, likeliest, groups[row.groups[0]], strict=True):
            logits = np.asarray(inner(mx.array([each.tokens[:-1]]))[0], np.float64)[each.start - 1 :]
            places = (np.arange(len(logits)), each.tokens[each.start :])
            np.testing.assert_allclose(got, np.log(np.exp(logits).sum(-1)) - logits[places], atol=1e-4)
            assert ids.tolist() == logits.argmax(-1).tolist()


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
    rows = take_rows(DocumentRows(cursor, 64, buffer_documents=1000), 2000 // 64)
    expected = text_loss(model, rows, tokenizer.token_bytes, micro_tokens=4096).bits_per_byte
    assert found["bpb"]["val"] == pytest.approx(expected, abs=TOLERANCE)
    moved = folder.rename(tmp_path / "moved")
    again = mlxchat("plan", *settings, f"outside.path={moved}")
    assert again.returncode == 0, again.stderr
    assert re.search(r"outside +done", again.stdout)
