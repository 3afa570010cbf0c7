"""How much text a run needs, computed from its horizon."""

import json
import shutil
from pathlib import Path

import pytest

from kit.models import composed
from mlxchat.errors import DataError
from mlxchat.planning.text import TextNeed, check_text_room, find_text_need
from mlxchat.store.store import Store
from mlxchat.sweep.job import plan_of

GIGA = 1_000_000_000


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))


def need_of(tmp_path: Path, *overrides: str) -> TextNeed | None:
    config, store = composed(*overrides), Store(tmp_path / "outputs")
    return find_text_need(config, plan_of(config, store), store)


def record_listing(tmp_path: Path, files: int, size: int, commit: str = "c" * 40) -> None:
    """Write what an earlier listing of FineWeb-Edu would have left."""
    folder = tmp_path / "cache" / "listings" / "datasets--karpathy--fineweb-edu-100b-shuffle"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(json.dumps({"commit": commit}))
    rows = [[f"shard_{index:05d}.parquet", size, f"{index:064d}", None] for index in range(files)]
    facts = {"repository": "karpathy/fineweb-edu-100b-shuffle", "kind": "dataset", "commit": commit}
    (folder / f"{commit}.json").write_text(json.dumps({**facts, "files": rows}))


@pytest.mark.parametrize(("packing", "kept"), [("best_fit", 0.65), ("best_fit_whole", 1.0)])
def test_need_is_the_tokens_in_characters_and_what_packing_drops(tmp_path, packing, kept):
    need = need_of(tmp_path, "experiment=speedrun_d20", "stage=pretrain", f"pretrain.packing={packing}")
    assert need.tokens == pytest.approx(11.2 * GIGA, rel=0.01)  # nanochat's published figure
    assert need.chars == pytest.approx(need.tokens * 4.8 / kept * 1.1)


def test_short_training_needs_what_its_tokenizer_reads(tmp_path):
    short = ("pretrain.num_iterations=1", "pretrain.tokens_per_parameter=null")
    need = need_of(tmp_path, "experiment=speedrun_d12", *short)
    assert need.chars == pytest.approx(2 * GIGA * 1.1)
    assert need_of(tmp_path, "experiment=quickstart") is None, "bundled text"


def test_need_counts_files_of_a_listing_and_repeated_epochs(tmp_path):
    record_listing(tmp_path, files=100, size=100_000_000)
    need = need_of(tmp_path, "experiment=speedrun_d20", "stage=pretrain", "pretrain.packing=best_fit")
    passes = need.tokens * 4.8 / 0.65 / (100 * 100_000_000 * 2.6)
    assert need.epochs == pytest.approx(passes)
    assert str(need).endswith(
        f"100 of 100 files, 10.0 GB to fetch; that is all there is, and the training passes over it {passes:.1f} times"
    )


def test_run_without_space_for_text_and_tokens_is_refused(tmp_path, monkeypatch):
    record_listing(tmp_path, files=1000, size=100_000_000)
    need = need_of(tmp_path, "experiment=speedrun_d20", "stage=pretrain", "pretrain.packing=best_fit")
    usage = shutil.disk_usage("/")._replace(free=50 * GIGA)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    # 91 GB of characters are 35 GB of files, and 19 billion tokens of two bytes.
    with pytest.raises(DataError, match=r"needs 7\d\.\d GB, but the disk of .* has 50\.0 GB free"):
        check_text_room(need, Store(tmp_path / "outputs"))
