"""Keys hold commits and sha256 digests of data from the Hub and from URLs."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import CoreConfig, HubConfig, TaskItem
from mlxchat.hub import client
from mlxchat.pipeline import plan_of, plan_to_run
from mlxchat.runner.keys import pin_externals
from mlxchat.store.fingerprint import identity_of
from mlxchat.store.store import Store

OTHER = "b" * 40


def hub_corpus(revision: str = "main") -> dict[str, Any]:
    return {"corpus": HubConfig(repository="org/texts", revision=revision, train_files="*.parquet", column="text")}


def task(**source: str) -> dict[str, Any]:
    return {"suite": {"maths": TaskItem(task="gsm8k", split="test", source=source)}}


def core(bundle: str, sha256: str | None = None) -> dict[str, Any]:
    return {"eval": CoreConfig(bundle=bundle, sha256=sha256)}


@pytest.fixture
def repositories(hub: Any) -> list[Any]:
    return [hub.add("org/texts", {"a.parquet": b"text"}), hub.add("openai/gsm8k", {"main/test-0.parquet": b"rows"})]


@pytest.mark.parametrize("section", [hub_corpus, task], ids=["corpus", "task"])
def test_key_has_the_commit_of_a_branch(section, hub, repositories):
    branch, commit = section(), section(revision=repositories[0].commit)
    pins = pin_externals(commit)
    assert hub.log == []
    assert pins == pin_externals(branch)
    assert identity_of(commit) == identity_of(branch)
    for repository in repositories:
        repository.commit = OTHER
    client.forget()
    assert pin_externals(branch) != pins


def test_file_and_url_with_equal_bytes_share_a_key(hub, tmp_path):
    bundle = tmp_path / "bundle.zip"
    bundle.write_bytes(b"zip")
    digest = hashlib.sha256(b"zip").hexdigest()
    found = [core(str(bundle)), core(f"{hub.url}/files/bundle.zip", digest)]
    assert pin_externals(found[0]) == pin_externals(found[1])
    assert identity_of(found[0]) == identity_of(found[1])
    assert pin_externals(core(f"{hub.url}/files/bundle.zip", "0" * 64)) != pin_externals(found[0])


SETTINGS = ("experiment=smoke", "targets=[eval_base]", "core=nanochat")


def run_key(hub: Any, outputs: Path, plan: Any = plan_to_run) -> str:
    """Return the key of the evaluation that reads CORE from an address."""
    config = compose_config([*SETTINGS, f"eval.core.bundle={hub.url}/files/bundle.zip", f"outputs={outputs}"]).config
    return {step.name: step.key for step in plan(config, Store(outputs))}["eval_base"]


def test_url_without_checksum_is_pinned_by_content(hub, tmp_path, monkeypatch):
    found = []
    for content in (b"one", b"two"):
        hub.files["bundle.zip"] = content
        monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / content.decode()))
        shown = run_key(hub, tmp_path / "outputs", plan_of)
        assert hub.requests("bundle.zip") == [], "a plan fetches nothing"
        found.append(run_key(hub, tmp_path / "outputs"))
        hub.log.clear()
        assert found[-1] == run_key(hub, tmp_path / "outputs", plan_of) != shown
        assert hub.requests("bundle.zip") == [], "it is fetched once"
    assert found[0] != found[1]
