"""Code digests: what changes them, and what the plan says."""

from pathlib import Path

from kit.toys import CHAIN
from mlxchat.config.pins import code_of_part
from mlxchat.runner.keys import changed_names, package_digest
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


def test_changed_code_is_reported(toys):
    toys.run(toys.plan(CHAIN))
    key = toys.plan(CHAIN)[0].key
    assert list(toys.store.made(key)["code"]["modules"]) == ["mlxchat", "stages/make.py"]
    toys.add("make", "text = str(ctx.config.toy.number)\n(ctx.out / 'result.txt').write_text(text)")  # the same bytes
    planned = {step.name: (step.state, step.reason) for step in toys.plan(CHAIN)}
    assert planned == {"one": ("done", "code drift: stages/make.py"), "two": ("done", "")}
    assert toys.plan(CHAIN)[0].key == key
