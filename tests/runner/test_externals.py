"""Outside files are part of the key by content, checked before and after a step; so are code and
remote repositories, by digest and commit."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit.toys import CHAIN, ONE
from mlxchat.composition.compose import compose_config
from mlxchat.config.pins import File, Folder, code_of_part
from mlxchat.config.schema import CoreConfig, HubConfig, TaskItem
from mlxchat.errors import StepFailed
from mlxchat.hub import client
from mlxchat.pipeline import plan_of, plan_to_run
from mlxchat.runner import keys
from mlxchat.runner.keys import changed_names, package_digest, pin_externals
from mlxchat.store.fingerprint import hash_file, identity_of
from mlxchat.store.locks import read_attempts
from mlxchat.store.store import Store


@dataclass
class Source:
    path: str = field(default="", metadata={"pin": File()})


def reading(toys: Any, tmp_path: Path, body: str) -> Path:
    """Have `make` read a file outside; return the file."""
    path = tmp_path / "text.txt"
    path.write_text("old")
    toys.config.toy = Source(str(path))
    toys.add("make", f"path = ctx.config.toy.path\n{body}")
    return path


COPY = "import pathlib; (ctx.out / 'result.txt').write_text(pathlib.Path(path).read_text())"


@pytest.mark.parametrize("when", ["while it ran", "since it was planned"])
def test_changed_file_fails_the_step(when, toys, tmp_path):
    path = reading(toys, tmp_path, f"{COPY}\npathlib.Path(path).write_text('new')" if "ran" in when else COPY)
    plan = toys.plan(ONE)
    if "planned" in when:
        path.write_text("new")
    with pytest.raises(StepFailed, match=rf"step one: .*toy\.path \(\.txt\) changed {when}.*same command again"):
        toys.run(plan)
    assert list(toys.store.manifests()) == []
    assert [attempt["outcome"] for attempt in read_attempts(toys.store.work(plan[0].key))] == ["failed"]


@dataclass
class Outside:
    path: str = field(default="", metadata={"pin": Folder(), "identity": False})


def test_folder_is_pinned_by_names_and_contents(tmp_path):
    pins = []
    for name, text in (("one", "weights"), ("two", "weights"), ("three", "other weights")):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "deep" / "model").write_text(text)
        pins.append(keys.pin_externals({"outside": Outside(str(tmp_path / name))}))
    assert pins[0] == pins[1] != pins[2]
    assert pins[0]["file of folder deep/model"] == hash_file(tmp_path / "one" / "deep" / "model")


def test_moved_file_keeps_its_key_and_another_setting_changes_it(tmp_path):
    def section(one: str, other: str) -> dict[str, Any]:
        return {"sft": {"a": TaskItem(task="jsonl", path=one), "b": TaskItem(task="jsonl", path=other)}}

    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "moved.jsonl")]
    for path, text in zip(paths, ("one", "two", "one"), strict=True):
        Path(path).write_text(text)
    here, moved, exchanged = section(*paths[:2]), section(paths[2], paths[1]), section(paths[1], paths[0])
    assert identity_of(here) == identity_of(moved) == identity_of(exchanged)
    assert keys.pin_externals(here) == keys.pin_externals(moved) != keys.pin_externals(exchanged)


FILES = {
    "mlxchat/model/gpt.py": "SCALE = 2\n", "mlxchat/tasks/facts.csv": "1,2\n", "mlxchat/errors.py": "\n",
    "mlxchat/serve/api.py": "\n",
}  # fmt: skip


def test_package_digest_covers_what_computes(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def digest() -> str:
        package_digest.cache_clear()
        return package_digest(tmp_path / "mlxchat")

    whole = digest()
    for name in FILES:
        (tmp_path / name).write_text("changed")
        assert (digest() != whole) == (name.split("/")[1] in ("model", "tasks")), name
        (tmp_path / name).write_text(FILES[name])
    (tmp_path / "mlxchat" / "tasks" / "new.py").touch()
    assert digest() != whole
    package_digest.cache_clear()


def test_own_code_is_everything_that_a_part_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {
        "judge.py": "import os\nimport numpy\ndef reward(*_):\n    from words.count import total\n    return 1\n",
        "words/__init__.py": "", "words/count.py": "from .letters import ALL\nimport mlxchat.tasks\n",
        "words/letters.py": "ALL = 26\n", "words/unused.py": "",
    }  # fmt: skip
    for name, text in own.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    before = code_of_part("judge:reward", hash_file)
    files = {"code judge.py", "code words/__init__.py", "code words/count.py", "code words/letters.py"}
    assert set(before) == {*files, "package numpy"}
    Path("words/letters.py").write_text("ALL = 27\n")
    assert changed_names(before, code_of_part("judge:reward", hash_file)) == ["code words/letters.py"]


def test_changed_code_is_reported(toys):
    toys.run(toys.plan(CHAIN))
    key = toys.plan(CHAIN)[0].key
    assert list(toys.store.made(key)["code"]["modules"]) == ["mlxchat", "stages/make.py"]
    toys.add("make", "text = str(ctx.config.toy.number)\n(ctx.out / 'result.txt').write_text(text)")  # the same bytes
    planned = {step.name: (step.state, step.reason) for step in toys.plan(CHAIN)}
    assert planned == {"one": ("done", "code drift: stages/make.py"), "two": ("done", "")}
    assert toys.plan(CHAIN)[0].key == key


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
