"""What pending steps read: local files, the text of a corpus, downloads."""

import json
from pathlib import Path

import pytest

from kit.commands import run_here
from kit.models import composed
from mlxchat.pipeline import plan_of
from mlxchat.planning.inputs import TextNeed, describe_downloads, find_downloads, find_text_need
from mlxchat.store.store import Store

GIGA = 1_000_000_000
CORPUS = "karpathy/fineweb-edu-100b-shuffle"
GOOD = {"question": "How many?", "answer": "Two."}


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """A file of conversations, of whose lines the second and the fourth are broken."""
    path = tmp_path / "mine.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f'{good}\n{{"question": 1, "answer": "x"}}\n{good}\nnot json\n')
    return path


@pytest.mark.parametrize("verb", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_broken_lines_are_found_before_anything_is_computed(verb, conversations, tmp_path, capsys):
    """Bug: a broken .jsonl for SFT was found after pretraining and midtraining."""
    settings = [f"+sft.mixture.mine={{task: jsonl, path: {conversations}}}"]
    assert run_here(*verb, "experiment=smoke", *settings, f"outputs={tmp_path}/outputs") == 2
    printed = capsys.readouterr().err
    assert f"sft.mixture.mine: {conversations} has 2 lines that are wrong" in printed
    assert "line 2: question and answer must be text" in printed
    assert not (tmp_path / "outputs").exists()


# Text and downloads


def need_of(tmp_path: Path, *overrides: str) -> TextNeed | None:
    config, store = composed(*overrides), Store(tmp_path / "outputs")
    return find_text_need(config, plan_of(config, store), store)


def downloads_of(tmp_path: Path, *overrides: str) -> dict[str, int | None]:
    config, store = composed(*overrides), Store(tmp_path / "outputs")
    return find_downloads(config, plan_of(config, store), store)


def record_listing(tmp_path: Path, repository: str, names: list[str], size: int) -> None:
    """Write what an earlier listing would have left."""
    commit = "c" * 40
    folder = tmp_path / "cache" / "listings" / f"datasets--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(json.dumps({"commit": commit}))
    rows = [[name, size, f"{index:064d}", None] for index, name in enumerate(names)]
    facts = {"repository": repository, "kind": "dataset", "commit": commit}
    (folder / f"{commit}.json").write_text(json.dumps({**facts, "files": rows}))


SHARDS = [f"shard_{index:05d}.parquet" for index in range(100)]


@pytest.mark.parametrize(("packing", "kept"), [("best_fit", 0.65), ("stream", 1.0)])
def test_need_is_the_tokens_in_characters_and_what_packing_drops(tmp_path, packing, kept):
    need = need_of(tmp_path, "experiment=speedrun_d20", "stage=pretrain", f"pretrain.packing={packing}")
    assert need.tokens == pytest.approx(11.2 * GIGA, rel=0.01)  # nanochat's published figure
    assert need.chars == pytest.approx(need.tokens * 4.8 / kept * 1.1)


def test_downloads_are_the_missing_files_of_listings(tmp_path):
    recipe = ("experiment=speedrun_d12", "stage=sft")
    assert set(downloads_of(tmp_path, *recipe).values()) == {None}, "nothing is listed"
    record_listing(tmp_path, CORPUS, SHARDS, size=100_000_000)
    record_listing(tmp_path, "openai/gsm8k", ["main/train-0.parquet", "main/test-0.parquet", "README.md"], size=1000)
    found = downloads_of(tmp_path, *recipe)
    need = need_of(tmp_path, *recipe)
    assert str(need).endswith(f"of 100 files, {found[CORPUS] / 1e9:.1f} GB to fetch")
    assert found[CORPUS] == 100_000_000 * (int(need.chars / 2.6 / 100_000_000) + 1)
    assert found["openai/gsm8k"] == 2000
    assert describe_downloads({"a": 2_000_000, "b": None}) == ("about 2.0 MB: a (2.0 MB), b (size unknown)")
