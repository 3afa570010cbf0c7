"""Distillation from our own server gives a mixture for SFT."""

from mlxchat.cli import dispatch
from mlxchat.config.schema import TaskItem
from mlxchat.data.conversation import render_conversation
from mlxchat.data.mixture import Mixture


def test_answers_of_our_server_become_a_mixture(start, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ask.txt").write_text("\n".join(["the cat", "the dog", "sat on", "<|assistant_end|> mat"]))
    with start(limits={"max_rows": 3}) as running:
        arguments = ["ask.txt", "--teacher", f"{running.url}/v1", "--model", "sft", "--out", "out.jsonl"]
        assert dispatch(["distill", *arguments, "--max-tokens", "8", "--keep-cut", "--samples", "2"]) == 0
    mixture = Mixture({"teacher": TaskItem(task="jsonl", path=str(tmp_path / "out.jsonl"))}, seed=0)
    assert len(mixture) == len((tmp_path / "out.jsonl").read_text().splitlines()) > 0
    for conversation in mixture:
        ids, mask = render_conversation(tokenizer, conversation)
        assert (ids[-1], mask[-1]) == (tokenizer.assistant_end, 1)
        assert ids.count(tokenizer.assistant_end) == 1
