"""How much text a run needs: from its horizon, against plain arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import DataError
from mlxchat.planning.text import TextNeed, check_text_room, describe_text, find_text_need
from mlxchat.store.store import Store
from mlxchat.sweep.job import plan_of

GIGA = 1_000_000_000


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))


def need_of(tmp_path: Path, *overrides: str) -> TextNeed | None:
    config = compose_config([*overrides, f"outputs={tmp_path / 'outputs'}"]).config
    store = Store(Path(config.outputs))
    return find_text_need(config, plan_of(config, store), store)


def record_listing(tmp_path: Path, files: int, size: int, commit: str = "c" * 40) -> None:
    """Write what an earlier listing of FineWeb-Edu would have left."""
    folder = tmp_path / "cache" / "listings" / "datasets--karpathy--fineweb-edu-100b-shuffle"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(json.dumps({"commit": commit}))
    rows = [[f"shard_{index:05d}.parquet", size, f"{index:064d}", None] for index in range(files)]
    facts = {"repository": "karpathy/fineweb-edu-100b-shuffle", "kind": "dataset", "commit": commit}
    (folder / f"{commit}.json").write_text(json.dumps({**facts, "files": rows}))


@pytest.mark.parametrize(("packing", "kept"), [("best_fit", 0.65), ("best_fit_whole", 1.0), ("stream", 1.0)])
def test_the_speedrun_needs_its_tokens_times_characters_and_what_packing_loses(
    tmp_path: Path, packing: str, kept: float
) -> None:
    need = need_of(tmp_path, "experiment=speedrun_d20", "stage=pretrain", f"pretrain.packing={packing}")
    assert need is not None
    assert need.tokens == pytest.approx(11.2 * GIGA, rel=0.01)  # nanochat's published figure
    assert need.chars == pytest.approx(need.tokens * 4.8 / kept * 1.1)


def test_twice_the_horizon_needs_twice_the_text(tmp_path: Path) -> None:
    one, two = (
        need_of(tmp_path, "corpus=fineweb_edu", "experiment=speedrun_d12", f"pretrain.tokens_per_parameter={ratio}")
        for ratio in (10, 20)
    )
    assert one is not None
    assert two is not None
    assert two.chars == pytest.approx(2 * one.chars, rel=1e-3)


def test_a_short_training_needs_what_its_tokenizer_reads(tmp_path: Path) -> None:
    need = need_of(
        tmp_path, "experiment=speedrun_d12", "pretrain.num_iterations=1", "pretrain.tokens_per_parameter=null"
    )
    assert need is not None
    assert need.chars == pytest.approx(2 * GIGA * 1.1)


def test_text_of_packages_needs_nothing(tmp_path: Path) -> None:
    assert need_of(tmp_path, "experiment=quickstart") is None


def test_files_are_counted_from_a_listing_and_repeated_epochs_are_told(tmp_path: Path) -> None:
    record_listing(tmp_path, files=100, size=100_000_000)
    need = need_of(tmp_path, "experiment=speedrun_d20", "stage=pretrain", "pretrain.packing=best_fit")
    assert need is not None
    assert need.known is not None
    passes = need.tokens * 4.8 / 0.65 / (100 * 100_000_000 * 2.6)
    assert need.epochs == pytest.approx(passes)
    assert (
        f"100 of 100 files, 10.0 GB to fetch; that is all there is, and the training passes over it {passes:.1f}"
        in str(need)
    )


def test_a_plan_says_what_it_needs(tmp_path: Path) -> None:
    config = compose_config(
        ["experiment=speedrun_d20", "pretrain.packing=best_fit", f"outputs={tmp_path / 'outputs'}"]
    ).config
    store = Store(Path(config.outputs))
    (line,) = describe_text(config, plan_of(config, store), store).items()
    assert line[0] == "corpus"
    assert line[1].startswith("text: 91.")


def test_a_run_without_room_for_text_and_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_listing(tmp_path, files=1000, size=100_000_000)
    need = need_of(tmp_path, "experiment=speedrun_d20", "stage=pretrain", "pretrain.packing=best_fit")
    usage = shutil.disk_usage("/")._replace(free=50 * GIGA)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    # 91 GB of characters are 35 GB of files, and 19 billion tokens of two bytes.
    with pytest.raises(DataError, match=r"needs 7\d\.\d GB, but the disk of .* has 50\.0 GB free"):
        check_text_room(need, Store(tmp_path / "outputs"))
