"""Code digests: what changes them, and the settings of `code`."""

from pathlib import Path
from typing import Any

import pytest

from kit.toys import CHAIN, started
from mlxchat.config.pins import code_of_part
from mlxchat.errors import Interrupted
from mlxchat.runner.keys import changed_names, code_of_stage, package_digest
from mlxchat.store.fingerprint import hash_file

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
    stage = code_of_stage(Path("judge.py"), "judge", tmp_path)
    assert list(stage) == ["mlxchat", "stages/judge.py", "words/__init__.py", "words/count.py", "words/letters.py"]


def states(toys: Any, code: str) -> dict[str, tuple[str, str]]:
    return {step.name: (step.state, step.reason) for step in toys.plan(CHAIN, code=code)}


def test_changed_code_is_reported_and_reruns_only_if_strict(toys):
    toys.run(toys.plan(CHAIN))
    key = toys.plan(CHAIN)[0].key
    assert list(toys.store.made(key)["code"]["modules"]) == ["mlxchat", "stages/make.py"]
    toys.add("make", "text = str(ctx.config.toy.number)\n(ctx.out / 'result.txt').write_text(text)")  # the same bytes
    assert states(toys, "warn") == {"one": ("done", "code drift (warn): stages/make.py"), "two": ("done", "")}
    assert set(states(toys, "ignore").values()) == {("done", "")}
    assert states(toys, "strict") == {
        "one": ("run", "code changed: stages/make.py"),
        "two": ("maybe", "input source (one) will be rebuilt"),
    }
    assert started(toys.run(toys.plan(CHAIN, code="strict"))) == ["one"]
    assert set(states(toys, "strict").values()) == {("done", "")}
    assert toys.plan(CHAIN)[0].key == key


@pytest.mark.parametrize(("policy", "seen"), [("warn", "old new"), ("ignore", "old new"), ("strict", "new")])
def test_saved_state_of_other_code_is_discarded_only_if_strict(policy: str, seen: str, toys: Any) -> None:
    saved = "state = ctx.work / 'state'\nstate.parent.mkdir(exist_ok=True)\n"
    toys.add("make", saved + "state.write_text('old ')\nraise ctx.stop('iteration 1')")
    with pytest.raises(Interrupted):
        toys.run(toys.plan(CHAIN, code=policy))
    assert states(toys, policy)["one"] == ("run", "missing, resumes")
    toys.add("make", saved + "old = state.read_text() if state.exists() else ''\n"
             "(ctx.out / 'result.txt').write_text(old + 'new')")  # fmt: skip
    step = toys.plan(CHAIN, code=policy)[0]
    toys.run(toys.plan(CHAIN, code=policy))
    assert (toys.outputs / "store" / toys.store.made(step.key)["name"] / "result.txt").read_text() == seen
