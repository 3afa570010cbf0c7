"""mlxchat data: downloads for offline runs, lists, and safe removal."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kit.commands import Say
from kit.text import parquet
from mlxchat.hub.cache import hub_cache
from mlxchat.hub.listings import forget
from mlxchat.planning import inputs
from mlxchat.store import locks

NAME = "org/texts"
SETTINGS = (
    "experiment=smoke", "stage=tokenizer", "corpus=hub", "corpus.packages=[]", f"corpus.hub.repository={NAME}",
    "corpus.hub.train_files=shard_*", "corpus.hub.validation_files=held_out.parquet", "tokenizer.max_chars=5000",
    "tokenizer.vocab_size=275",
)  # fmt: skip
CORPUS_ALONE = tuple(word.replace("stage=tokenizer", "stage=corpus") for word in SETTINGS)


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
    size = sum(len(texts.files[name]) for name in ("held_out.parquet", "shard_0.parquet"))
    told = say("data", "fetch", *SETTINGS).splitlines()[-1]
    assert told == f"everything is there: 2 files of the Hub ({size / 1000:.1f} kB)", "and not: 0 downloads"
    fetched = sorted({each.path.rpartition("/")[2] for each in hub.requests("parquet")})
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


def test_dry_run_fetches_nothing(hub, texts, say):
    assert f"{NAME} at {texts.commit[:12]}: 7 files" in say("data", "fetch", "--dry-run", *SETTINGS)
    assert hub.requests("parquet") == []


def test_data_ls_shows_size_commit_and_users(hub, texts, say):
    assert "no downloads yet" in say("data", "ls")
    say("data", "fetch", *SETTINGS)
    say(*CORPUS_ALONE)
    found = json.loads(say("data", "ls", "--json"))
    (holding,) = found["holdings"]
    assert (holding["name"], holding["revision"], holding["verified"]) == (NAME, texts.commit, True)
    assert [name.split("-")[0] for name in holding["needed_by"]] == ["corpus"]
    assert found["bytes"] == holding["bytes"] == sum(map(len, texts.files.values()))
    assert f"{NAME}  {texts.commit[:12]}" in say("data", "ls")


def test_data_of_artifacts_needs_force_to_remove(hub, texts, say):
    say(*CORPUS_ALONE)
    assert "Nothing was removed" in say("data", "rm", NAME, code=2)
    assert "would remove" in say("data", "rm", NAME, "--dry-run")
    before = json.loads(say("data", "ls", "--json"))["bytes"]
    assert before > 0
    ends = time.monotonic() + 60  # the command before was of this process, and may still fetch what it did not need
    while any(map(locks.is_held, (hub_cache() / ".locks").rglob("*.lock"))):
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert f"removed {NAME}" in say("data", "rm", NAME, "--force")
    assert json.loads(say("data", "ls", "--json"))["holdings"] == []


def test_removing_keeps_files_of_other_commits(hub, texts, say, tmp_path):
    say("data", "fetch", *SETTINGS)
    old = texts.commit
    texts.commit, texts.files["shard_0.parquet"] = "f" * 40, shard(9)
    say("data", "fetch", *SETTINGS)
    sent = hub.sent()
    say("data", "rm", f"{NAME}@{old[:8]}")
    assert [holding["revision"] for holding in json.loads(say("data", "ls", "--json"))["holdings"]] == ["f" * 40]
    say("data", "fetch", *SETTINGS)
    assert hub.sent() == sent
    blobs = [path for path in (tmp_path / "hf").rglob("blobs/*") if path.is_file()]
    assert len(blobs) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data", "rm", "org/text"), "no download is called org/text"),
        (("data", "rm"), "expected mlxchat data rm NAME"),
        (("data", "fech"), 'expected mlxchat data fetch|ls|rm|show, got "fech". Did you mean "fetch"?'),
    ],
)
def test_mistakes_give_one_message(hub, texts, say, words, message):
    assert message in say(*words, code=2)
