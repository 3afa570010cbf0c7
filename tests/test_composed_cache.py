"""Kept configurations: equal to composed ones in every bit, never older than what they were made of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import omegaconf
import pytest

from mlxchat.composition import compose
from mlxchat.composition.compose import compose_config, conf_folder, group_options
from mlxchat.config.schema import MISSING
from mlxchat.errors import ConfigError

OPTIONS = [
    # The vocabulary that the storyteller takes over comes with an extra.
    *(
        [f"experiment={name}", *["tokenizer.source=train"] * name.startswith("tiny")]
        for name in group_options("experiment")
    ),
    ["model=d6", "optimizer=adamw", "architecture=jul2026", "machine=cpu", "seed=7", "rl.eval_every=null"],
    [
        "stage=sft",
        "force=[sft]",
        f"+sft.mixture.mine={{task: jsonl, path: '{__file__}'}}",
        "seed=${model.depth}",
    ],
    ["~pipeline.midtrain", "pipeline.sft.checkpoint=pretrain", "~pipeline.eval_mid"],
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXCHAT_COMPOSED_CACHE", raising=False)
    return tmp_path / "cache" / "mlxchat" / "composed"


def refuse(overrides: list[str], primary: Path | None) -> None:
    raise AssertionError(f"composed {overrides}")


def aged(path: Path, text: str, seconds: float = 60.0) -> None:
    """Write a file as if it had been written a while ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - seconds, time.time() - seconds))


@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda overrides: overrides[0])
def test_what_was_kept_equals_what_is_composed_to_the_type_of_every_value(
    overrides: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", -1e9)
    composed = compose_config(overrides)
    assert len(list(home.iterdir())) == 1
    monkeypatch.setattr(compose, "_compose", refuse)
    kept = compose_config(overrides)
    assert (kept, repr(kept)) == (composed, repr(composed))


def test_folders_of_outputs_share_an_entry(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXCHAT_COMPOSED_CACHE", "off")
    monkeypatch.setattr(compose, "_place_of_outputs", lambda overrides: None)
    composed = compose_config(["seed=7", "outputs=/a-b/c.d"])
    assert not home.exists(), "nothing is kept where that is switched off"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parents[1]))
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", -1e9)
    for outputs in ("outputs=/somewhere/else", "outputs='/quoted'", "outputs=/${name}"):
        compose_config([outputs, "seed=7"])
    monkeypatch.setattr(compose, "_compose", refuse)
    assert repr(compose_config(["seed=7", "outputs=/a-b/c.d"])) == repr(composed)
    assert compose_config(["outputs=/first/one", "seed=7", "outputs=second/"]).config.outputs == "second/"


def test_a_changed_added_or_removed_file_of_ones_own_is_composed_anew(tmp_path: Path) -> None:
    mine = tmp_path / "conf" / "model" / "mine.yaml"
    aged(mine, "defaults: [d4, _self_]\nname: mine\ndepth: 6\n", 70)
    arguments = (["model=mine"], [str(tmp_path / "conf")])
    assert [compose_config(*arguments).config.model.depth for _ in range(2)] == [6, 6]
    aged(mine, "defaults: [d4, _self_]\nname: mine\ndepth: 8\n", 60)
    assert compose_config(*arguments).config.model.depth == 8
    mine.unlink()
    with pytest.raises(ConfigError, match="mine"):
        compose_config(*arguments)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_entry_is_ignored(damage: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", -1e9)
    composed = compose_config(["model=d6"])
    (entry,) = home.iterdir()
    content = bytearray(entry.read_bytes())
    whole = bytes(content)
    if damage == "truncate":
        content = content[:-40]
    elif damage == "empty":
        content = bytearray()
    else:
        content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    assert repr(compose_config(["model=d6"])) == repr(composed)
    assert entry.read_bytes() == whole, "and written anew"


def test_nothing_is_kept_that_may_come_out_otherwise_next_time(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", -1e9)
    for number in ("3", "4"):
        monkeypatch.setenv("SEED_OF_TEST", number)
        assert compose_config(["seed=${oc.env:SEED_OF_TEST}"]).config.seed == int(number)
    aged(tmp_path / "conf" / "model" / "mine.yaml", "defaults: [d4, _self_]\ndepth: ${oc.env:SEED_OF_TEST}\n")
    assert compose_config(["model=mine"], [str(tmp_path / "conf")]).config.model.depth == 4
    compose_config(["hydra.searchpath=[]"])
    assert not home.exists()


def test_a_file_that_was_changed_just_now_keeps_its_entry_from_being_made(home: Path, tmp_path: Path) -> None:
    aged(tmp_path / "conf" / "model" / "mine.yaml", "defaults: [d4, _self_]\n", -60.0)  # however long composing takes
    compose_config(["model=mine"], [str(tmp_path / "conf")])
    assert not home.exists()


def test_a_mistake_in_a_value_is_told_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", -1e9)
    for _ in range(2):
        with pytest.raises(ConfigError, match="window_pattern"):
            compose_config(["architecture.window_pattern=XYZ"])


def test_the_yaml_that_ships_refers_to_nothing_outside_but_the_time_in_a_sweeps_folder() -> None:
    resolvers = [
        (path.name, found)
        for path in conf_folder().rglob("*.yaml")
        for found in re.findall(r"\$\{\s*[\w.]+\s*:[^}]*\}", path.read_text())
    ]
    assert set(resolvers) <= {("config.yaml", "${now:%Y%m%d-%H%M%S-%f}")}, resolvers


def test_our_mark_of_a_missing_value_is_omegaconfs() -> None:
    assert MISSING == omegaconf.MISSING


def test_a_kept_configuration_needs_neither_hydra_nor_omegaconf(home: Path, tmp_path: Path) -> None:
    code = (
        "import sys, mlxchat.composition.cache as cache; cache._SETTLED_SECONDS = -1e9\n"
        "from mlxchat.composition.compose import compose_config\ncompose_config(['model=d6'])\n"
        "print(sorted({'hydra', 'omegaconf', 'yaml', 'numpy', 'mlx', 'rich'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code]
    first, second = (subprocess.check_output(run, cwd=tmp_path, text=True, env={**os.environ}) for _ in range(2))
    assert "hydra" in first
    assert second == "[]\n"
