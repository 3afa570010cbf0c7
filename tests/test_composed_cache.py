"""The cache of composed configurations: exact, never stale."""

import os
import re
import time
from pathlib import Path

import pytest

from mlxchat.composition import compose
from mlxchat.composition.compose import compose_config, conf_folder
from mlxchat.errors import ConfigError

OPTIONS = [
    ["model=d6", "optimizer=adamw", "architecture=jul2026", "machine=cpu", "seed=7", "rl.eval_every=null"],
    ["stage=sft", "force=[sft]", f"+sft.mixture.mine={{task: jsonl, path: '{__file__}'}}", "seed=${model.depth}"],
    ["~pipeline.midtrain", "pipeline.sft.checkpoint=pretrain", "~pipeline.eval_mid"],
    ["model=d4", "name='a path that is not UTF-8: \udcff'"],
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which keeps configurations however recently files changed."""
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", -1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXCHAT_COMPOSED_CACHE", raising=False)
    return tmp_path / "cache" / "mlxchat" / "composed"


def refuse(overrides: list[str], primary: Path | None) -> None:
    raise AssertionError(f"composed {overrides}")


def aged(path: Path, text: str, seconds: float = 60.0) -> None:
    """Write a file with an mtime this many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - seconds, time.time() - seconds))


@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda overrides: overrides[0])
def test_cached_configuration_equals_the_composed_one(overrides, home, monkeypatch):
    composed = compose_config(overrides)
    assert len(list(home.iterdir())) == 1
    monkeypatch.setattr(compose, "_compose", refuse)
    kept = compose_config(overrides)
    assert (kept, repr(kept)) == (composed, repr(composed))


def test_outputs_folders_share_an_entry(home, monkeypatch):
    monkeypatch.setenv("MLXCHAT_COMPOSED_CACHE", "off")
    monkeypatch.setattr(compose, "_place_of_outputs", lambda overrides: None)
    composed = compose_config(["seed=7", "outputs=/a-b/c.d"])
    assert not home.exists(), "switched off"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parents[1]))
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", -1e9)
    for outputs in ("outputs=/somewhere/else", "outputs='/quoted'", "outputs=/${name}"):
        compose_config([outputs, "seed=7"])
    monkeypatch.setattr(compose, "_compose", refuse)
    assert repr(compose_config(["seed=7", "outputs=/a-b/c.d"])) == repr(composed)
    assert compose_config(["outputs=/first/one", "seed=7", "outputs=second/"]).config.outputs == "second/"


def test_changed_own_file_invalidates_the_entry(tmp_path):
    mine = tmp_path / "conf" / "model" / "mine.yaml"
    aged(mine, "defaults: [d4, _self_]\nname: mine\ndepth: 6\n", 70)
    arguments = (["model=mine"], [str(tmp_path / "conf")])
    assert [compose_config(*arguments).config.model.depth for _ in range(2)] == [6, 6]
    aged(mine, "defaults: [d4, _self_]\nname: mine\ndepth: 8\n", 60)
    assert compose_config(*arguments).config.model.depth == 8
    mine.unlink()
    with pytest.raises(ConfigError, match="mine"):
        compose_config(*arguments)


def test_damaged_entry_is_ignored_and_rewritten(home):
    composed = compose_config(["model=d6"])
    (entry,) = home.iterdir()
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (b"", whole[:-40], flipped):
        entry.write_bytes(damaged)
        assert repr(compose_config(["model=d6"])) == repr(composed)
        assert entry.read_bytes() == whole


def test_resolvers_and_hydra_settings_are_not_cached(home, monkeypatch, tmp_path):
    for number in ("3", "4"):
        monkeypatch.setenv("SEED_OF_TEST", number)
        assert compose_config(["seed=${oc.env:SEED_OF_TEST}"]).config.seed == int(number)
    aged(tmp_path / "conf" / "model" / "mine.yaml", "defaults: [d4, _self_]\ndepth: ${oc.env:SEED_OF_TEST}\n")
    assert compose_config(["model=mine"], [str(tmp_path / "conf")]).config.model.depth == 4
    compose_config(["hydra.searchpath=[]"])
    assert not home.exists()


def test_recently_changed_file_prevents_caching(home, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxchat.composition.cache._SETTLED_SECONDS", 2.0)
    aged(tmp_path / "conf" / "model" / "mine.yaml", "defaults: [d4, _self_]\n", -60.0)  # however long composing takes
    compose_config(["model=mine"], [str(tmp_path / "conf")])
    assert not home.exists()


def test_shipped_yaml_uses_no_resolver_but_now():
    resolvers = [
        (path.name, found)
        for path in conf_folder().rglob("*.yaml")
        for found in re.findall(r"\$\{\s*[\w.]+\s*:[^}]*\}", path.read_text())
    ]
    assert set(resolvers) <= {("config.yaml", "${now:%Y%m%d-%H%M%S-%f}")}, resolvers
