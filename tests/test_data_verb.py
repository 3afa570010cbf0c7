"""mlxchat data: downloads for offline runs; `data show` with its marks of trained text, counts and order."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.commands import Say
from kit.text import parquet
from mlxchat.cli import dispatch
from mlxchat.errors import ConfigError
from mlxchat.hub.client import forget
from mlxchat.planning import inputs

NAME = "org/texts"
SETTINGS = (
    "experiment=smoke", "stage=tokenizer", "corpus=hub", "corpus.packages=[]", f"corpus.hub.repository={NAME}",
    "corpus.hub.train_files=shard_*", "corpus.hub.validation_files=held_out.parquet", "tokenizer.max_chars=5000",
    "tokenizer.vocab_size=275",
)  # fmt: skip


def shard(seed: int) -> bytes:
    words = ["apple", "bread", "cloud", "door", "earth"]
    return parquet(
        [f"{seed} " + " ".join(words[(number * seed + place) % 5] for place in range(30)) for number in range(40)]
    )


@pytest.fixture
def texts(hub: Any) -> Any:
    names = ["held_out.parquet", *(f"shard_{index}.parquet" for index in range(6))]
    return hub.add(NAME, {name: shard(seed) for seed, name in enumerate(names)})


@pytest.fixture
def say(say: Say, hub: Any, tmp_path: Path) -> Say:
    def run(*words: str, code: int = 0) -> str:
        """Run `mlxchat WORDS` as a new process would; return what it prints."""
        forget()
        return say(*words, f"outputs={tmp_path / 'outputs'}", code=code)

    return run


def test_fetch_gets_exactly_what_a_run_needs(hub, texts, say, monkeypatch):
    monkeypatch.setattr(inputs, "LEAST_CHARS", 0)
    say("data", "fetch", "--dry-run", *SETTINGS)
    assert hub.requests("parquet") == []
    size = sum(len(texts.files[name]) for name in ("held_out.parquet", "shard_0.parquet"))
    told = say("data", "fetch", *SETTINGS).splitlines()[-1]
    assert told == f"everything is there: 2 files of the Hub ({size / 1000:.1f} kB), 0 of other addresses"
    fetched = sorted({path.rpartition("/")[2] for _, path in hub.requests("parquet")})
    # The tokenizer reads 5,500 characters, and the held-out file says that a file has 6,000 and more.
    assert fetched == ["held_out.parquet", "shard_0.parquet"]


def test_run_after_fetch_needs_no_network(hub, texts, say, monkeypatch):
    say("data", "fetch", *SETTINGS)
    hub.stop()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "tokenizer  done" in say(*SETTINGS)


def test_offline_run_without_fetch_names_the_command(hub, texts, say, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", ["mlxchat", "experiment=smoke"])
    text = say(*SETTINGS, code=2)
    assert f"corpus.hub.revision: the commit of {NAME} at main is unknown, since HF_HUB_OFFLINE is set" in text
    assert "run: mlxchat data fetch experiment=smoke" in text


Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    """Run the verb on an own mixture of two tasks; return what it printed."""
    folder = tmp_path / "conf" / "mixture"
    folder.mkdir(parents=True)
    path = tmp_path / "mine.jsonl"
    talks = [{"question": f"q{n}?", "answer": f"sum <<{n}+1={n + 1}>>{n + 1}"} for n in range(8)]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "my_mixture.yaml").write_text(
        f"mine: {{task: identity_conversations, path: '{path}', epochs: 2}}\nsums: {{task: arithmetic, size: 4}}\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert dispatch(["data", "show", "--config-dir", str(tmp_path / "conf"), *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_tasks_are_counted_and_trained_text_is_between_marks(show):
    printed = show("mixture=my_mixture", "-n", "1", "--task", "mine")
    lines = show("mixture=my_mixture", "-n", "0").splitlines()
    assert lines[0].startswith("mixture my_mixture: 20 conversations, tokens are bytes")
    assert any(re.match(r"mine +16 +80\.0% +\d+ +\d+% +\d+ *$", line) for line in lines)
    assert any(re.match(r"sums +4 +20\.0% ", line) for line in lines)
    n = int(re.search(r"mine conversation (\d)", printed)[1])
    assert (
        f"<|bos|><|user_start|>q{n}?<|user_end|><|assistant_start|>⟦sum <|python_start|>{n}+1<|python_end|>⟧"
        f"<|output_start|>{n + 1}<|output_end|>⟦{n + 1}<|assistant_end|>⟧"
    ) in printed


def test_wrong_arguments_are_refused(show):
    for arguments, expected in (
        ("mixture=my_mixture --task mines", 'there is no "mines" in mixture my_mixture: .*Did you mean "mine"'),
        ("stage=corpus", 'stage is "corpus", expected one of midtrain, sft, preference, rl, eval'),
        ("stage=rl mixture=my_mixture", "mixture= is for midtrain and sft"),
    ):
        with pytest.raises(ConfigError, match=expected):
            show(*arguments.split())
