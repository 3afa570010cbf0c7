"""Data of the Hub and of addresses: their commit or sha256 is in the key, whatever a branch or an address holds now."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import CoreConfig, HubConfig, TaskItem
from mlxchat.errors import ConfigError, DataError, MlxchatError
from mlxchat.hub import listings
from mlxchat.runner.keys import find_unknown, pin_externals
from mlxchat.store.fingerprint import identity_of
from mlxchat.store.store import Store
from mlxchat.sweep.job import plan_of, plan_to_run

OTHER = "b" * 40


def hub_corpus(revision: str = "main") -> dict[str, Any]:
    """Return a section with a data set of the Hub."""
    return {"corpus": HubConfig(repository="org/texts", revision=revision, train_files="*.parquet", column="text")}


def task(**source: str) -> dict[str, Any]:
    """Return a section with a task of the Hub."""
    return {"suite": {"maths": TaskItem(task="gsm8k", split="test", source=source)}}


def core(bundle: str, sha256: str | None = None) -> dict[str, Any]:
    """Return a section with CORE."""
    return {"eval": CoreConfig(bundle=bundle, sha256=sha256)}


@pytest.fixture
def repositories(hub: Any) -> list[Any]:
    """Offer two data sets."""
    return [hub.add("org/texts", {"a.parquet": b"text"}), hub.add("openai/gsm8k", {"main/test-0.parquet": b"rows"})]


@pytest.mark.parametrize("section", [hub_corpus, task], ids=["corpus", "task"])
def test_the_key_holds_the_commit_that_a_branch_means(section: Any, hub: Any, repositories: list[Any]) -> None:
    """A branch that moved once gave other results under the same key."""
    before = pin_externals(section())
    assert pin_externals(section()) == before
    assert [each.path for each in hub.log if "/revision/" in each.path] == [hub.log[0].path], "one request a process"
    listings.forget()
    assert pin_externals(section()) == before
    for repository in repositories:
        repository.commit = OTHER
    listings.forget()
    assert pin_externals(section()) != before


@pytest.mark.parametrize("section", [hub_corpus, task], ids=["corpus", "task"])
def test_a_commit_is_the_same_key_as_the_branch_and_needs_no_request(
    section: Any, hub: Any, repositories: list[Any]
) -> None:
    branch, commit = section(), section(revision=repositories[0].commit)
    pins = pin_externals(commit)
    assert hub.log == []
    assert pins == pin_externals(branch)
    assert identity_of(commit) == identity_of(branch)


def test_another_repository_is_another_key(hub: Any, repositories: list[Any]) -> None:
    hub.add("me/copy", {"main/test-0.parquet": b"rows"})
    assert pin_externals(task()) != pin_externals(task(repository="me/copy"))


def test_without_a_network_the_recorded_commit_counts_and_is_said(
    hub: Any, repositories: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pin_externals(hub_corpus())
    listings.forget()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pin_externals(hub_corpus()) == before
    assert f"org/texts: offline; main is commit {repositories[0].commit[:12]}, as recorded" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_left_after_the_limit_and_not_requested_again(
    hub: Any, repositories: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listings, "_PLAN_SECONDS", 0.2)
    hub.faults.latency_seconds = 5.0
    assert find_unknown(pin_externals(hub_corpus())) == {"corpus.revision": "org/texts at main"}
    asked = len(hub.log)
    assert find_unknown(pin_externals(task())) == {"suite.maths.source": "openai/gsm8k at main"}
    assert len(hub.log) == asked == 1


def test_a_repository_that_is_not_there_is_refused_while_planning(hub: Any) -> None:
    with pytest.raises(DataError, match=r"org/texts: the Hub at .* has no such dataset or revision"):
        pin_externals(hub_corpus())


def test_a_file_and_an_address_with_its_bytes_are_one_key(hub: Any, tmp_path: Path) -> None:
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


def test_an_address_without_a_checksum_counts_by_what_is_fetched_from_it(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address alone was in the key once."""
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


def test_a_run_without_a_network_is_refused_with_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    config = compose_config(["experiment=smoke", "corpus=tinystories", "targets=[corpus]"]).config
    plan_of(config, Store(tmp_path))
    with pytest.raises(ConfigError, match=r"roneneldan/TinyStories at main .*corpus\.hub\.revision=COMMIT"):
        plan_to_run(config, Store(tmp_path))
    address = compose_config([*SETTINGS, f"outputs={tmp_path}"]).config
    with pytest.raises(MlxchatError, match=r"eval_bundle\.zip is not on this machine, and HF_HUB_OFFLINE is set"):
        plan_to_run(address, Store(tmp_path))
