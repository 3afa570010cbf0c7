"""Code digests: which modules a stage uses, what changes a digest, and the settings of `code`."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.toys import CHAIN, started
from mlxchat.runner import keys
from mlxchat.runner.keys import CodeDigests, changed_modules
from mlxchat.runner.stage import Stages
from mlxchat.store.files import Records

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "mlxchat/__init__.py": "VERSION = 1\n",
    "mlxchat/model/__init__.py": '"""Models."""\n',
    "mlxchat/model/gpt.py": "import math\nfrom mlxchat.ops.norm import norm\nSCALE = 2\n",
    "mlxchat/ops/__init__.py": "",
    "mlxchat/ops/norm.py": "from mlxchat.model import gpt\ndef norm(x):\n    return x\n",
    "mlxchat/ops/late.py": "RATE = 1\n",
    "mlxchat/ops/unused.py": "import mlxchat.ops.norm\n",
    "mlxchat/tasks/__init__.py": "import importlib\ndef load(n):\n    importlib.import_module(f'mlxchat.tasks.{n}')\n",
    "mlxchat/tasks/sums.py": (
        "from pathlib import Path\nONE = Path(__file__).with_name('facts.csv')\n"
        "TEXTS, LATER = ONE.with_name('texts'), ONE.with_name('made.csv')\n"
    ),
    "mlxchat/tasks/facts.csv": "1,2\n",
    "mlxchat/tasks/unread.csv": "3,4\n",
    "mlxchat/tasks/texts/one.txt": "one\n",
    "mlxchat/typed.py": "x = 1\n",
    "mlxchat/errors.py": "class Wrong(Exception): ...\n",
    "mlxchat/runner/context.py": "import mlxchat.ops.unused\n",
    "recipes/__init__.py": "",
    "recipes/train.py": (
        "from typing import TYPE_CHECKING\n"
        "from mlxchat.errors import Wrong\n"
        "from mlxchat.model.gpt import SCALE\n"
        "from mlxchat.runner.context import Context\n"
        "if TYPE_CHECKING:\n    from mlxchat.typed import x\n"
        "def run(ctx):\n    from mlxchat.ops import late\n    import mlxchat.tasks\n"
    ),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def modules(tree: Path, cache: str = "none/index/code.json") -> dict[str, str]:
    """Return the digests of the stage `train` as a new process finds them."""
    digests = CodeDigests(tree / cache, tree / "mlxchat")
    found = digests.of_stage(tree / "recipes" / "train.py")
    digests.save()
    return found


def test_closure_follows_all_kinds_of_imports(tree: Path) -> None:
    assert list(modules(tree)) == [
        "model/__init__.py", "model/gpt.py", "ops/__init__.py", "ops/late.py", "ops/norm.py", "stages/train.py",
        "tasks/__init__.py", "tasks/facts.csv", "tasks/sums.py", "tasks/texts/one.txt",
    ]  # fmt: skip


def test_real_stage_uses_the_model_not_the_runner() -> None:
    found = CodeDigests(Path("/none/index/x"), ROOT / "src/mlxchat").of_stage(Stages()["pretrain"].path)
    assert {"stages/pretrain.py", "model/gpt.py", "optim/muon.py", "training/loop.py", "ops/attention.py"} <= set(found)
    assert not [name for name in found if name.startswith(("runner/", "commands/", "report/", "cli"))]


def test_closure_has_every_module_that_python_imports(tmp_path: Path) -> None:
    code = "import sys, mlxchat.stages.sft; print(*[m.__file__ for n, m in sys.modules.items() if n[:8] == 'mlxchat.'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    library = ROOT / "src" / "mlxchat"
    loaded = {Path(path) for path in done.stdout.split() if path != "None"}
    names = {str(path.relative_to(library)) for path in loaded if path.is_relative_to(library)}
    computing = {name for name in names if not keys.computes_nothing(name.removesuffix(".py").split("/")[0])}
    found = CodeDigests(Path("/none/index/x"), library).of_stage(Stages()["sft"].path)
    # cpu/__init__.py is imported by the package itself, before any stage.
    assert computing - set(found) <= {"cpu/__init__.py"}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("mlxchat/model/gpt.py", "SCALE = 2", "SCALE = 3"),
        ("mlxchat/ops/late.py", "RATE = 1", "RATE = 1.0"),
        ("mlxchat/tasks/facts.csv", "1,2", "1,3"),
        ("mlxchat/tasks/texts/one.txt", "one", "two"),
    ],
)
def test_change_is_named_by_its_module(name: str, old: str, new: str, tree: Path) -> None:
    before = modules(tree)
    path = tree / name
    path.write_text(path.read_text().replace(old, new))
    assert changed_modules(before, modules(tree)) == [name.removeprefix("mlxchat/")]


def test_unrelated_modules_do_not_change_the_digest(tree: Path) -> None:
    before = modules(tree)
    for name in ("ops/unused.py", "typed.py", "errors.py", "runner/context.py", "tasks/unread.csv"):
        (tree / "mlxchat" / name).write_text("raise SystemExit\n")
        assert modules(tree) == before, name


def test_added_and_removed_imports_are_named(tree: Path) -> None:
    before = modules(tree)
    (tree / "mlxchat/model/gpt.py").write_text("SCALE = 2\n")
    (tree / "mlxchat/tasks/new.py").write_text("")
    assert changed_modules(before, modules(tree)) == ["model/gpt.py", "ops/norm.py", "tasks/new.py"]


def test_digests_do_not_depend_on_location(tree: Path, tmp_path: Path) -> None:
    before = modules(tree)
    shutil.copytree(tree / "mlxchat", tmp_path / "else" / "lib" / "mlxchat")
    shutil.copytree(tree / "recipes", tmp_path / "else" / "recipes2")
    digests = CodeDigests(tmp_path / "x/y/z", tmp_path / "else" / "lib" / "mlxchat")
    assert digests.of_stage(tmp_path / "else" / "recipes2" / "train.py") == before


def interpreters() -> list[str]:
    """Return the other Pythons of this machine that this package supports."""
    found = []
    for name in ("python3.12", "python3.13"):
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            found.append(path)
    pyenv = Path.home() / ".pyenv" / "versions"
    return found or [str(path) for path in sorted(pyenv.glob("3.1[23]*/bin/python"))]


DIGEST_CODE = """
import importlib.util, json, sys, types
root, library = sys.argv[1:3]
for name in ("mlxchat", "mlxchat.runner"):  # without what the package imports besides
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [f"{root}/{name.replace('.', '/')}"]
from pathlib import Path
from mlxchat.runner.keys import CodeDigests
digests = CodeDigests(Path("/none/index/x"), Path(library))
print(json.dumps({stage: digests.of_stage(Path(stage)) for stage in sys.argv[3:]}))
"""


@pytest.mark.slow
def test_digests_are_equal_in_every_supported_python() -> None:
    stages = [str(ROOT / "stages" / f"{name}.py") for name in ("pretrain", "rl", "eval")]
    others = interpreters()
    if not others:
        pytest.skip("no other Python here")
    found = []
    for python in [sys.executable, *others]:
        done = subprocess.run(
            [python, "-c", DIGEST_CODE, str(ROOT / "src"), str(ROOT / "src" / "mlxchat"), *stages],
            capture_output=True, text=True, check=True, cwd="/",
        )  # fmt: skip
        found.append(json.loads(done.stdout))
    assert all(digests == found[0] for digests in found)


def test_digests_are_cached_until_files_change(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_SETTLED_NANOSECONDS", -1)
    before = modules(tree, "index/code.json")

    def refuse(tree: Any) -> str:
        raise AssertionError(f"{ast.unparse(tree)} was hashed again")

    monkeypatch.setattr(keys, "hash_tree", refuse)
    assert modules(tree, "index/code.json") == before
    (tree / "mlxchat/ops/late.py").write_text("RATE = 7\n")
    with pytest.raises(AssertionError, match="RATE = 7 was hashed again"):
        modules(tree, "index/code.json")


def edit(toys: Any) -> None:
    """Change the code of `make`, not what it makes."""
    toys.add("make", "text = str(ctx.config.toy.number)\n(ctx.out / 'result.txt').write_text(text)")


def states(toys: Any, code: str) -> dict[str, tuple[str, str]]:
    return {step.name: (step.state, step.reason) for step in toys.plan(CHAIN, code=code)}


def test_code_warn_names_the_module_and_runs_nothing(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    edit(toys)
    assert states(toys, "warn") == {"one": ("done", "code drift (warn): stages/make.py"), "two": ("done", "")}
    assert set(states(toys, "ignore").values()) == {("done", "")}


def test_code_strict_reruns_the_step_once(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    rid = toys.plan(CHAIN)[0].key
    assert list(toys.store.made(rid)["code"]["modules"]) == ["stages/make.py"]
    edit(toys)
    assert states(toys, "strict") == {
        "one": ("run", "code changed: stages/make.py"),
        "two": ("maybe", "input source (one) will be rebuilt"),
    }
    run = toys.run(toys.plan(CHAIN, code="strict"))
    assert started(run) == ["one"]
    assert set(states(toys, "strict").values()) == {("done", "")}
    assert toys.plan(CHAIN)[0].key == rid


def test_code_strict_rejects_artifacts_of_other_code(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 2
    toys.run(toys.plan(CHAIN))
    toys.add("make", "(ctx.out / 'result.txt').write_text('1')")
    path = toys.package / "copy.py"
    path.write_text(path.read_text() + "\nMORE = 1\n")
    run = toys.run(toys.plan(CHAIN, code="strict", force=["one"]))
    assert {event["event"] for event in Records(run.folder / "events.jsonl").read()}.isdisjoint({"step_shared"})


CODE = '''"""A module."""
import os

LIMIT = 3  # as many as fit


@cache
def run(ctx, rate=0.1):
    """Run."""
    total = os.cpu_count() + LIMIT
    return {"total": total}
'''


def digest(code: str, path: Path) -> str:
    """Return the digest of a file with this code."""
    path.write_text(code, encoding="utf-8")
    return str(keys._read_code(path)["digest"])


SAME = {
    "# as many as fit": "# fewer", "  # as many as fit": "", '"""A module."""': '"""Another text\n\nof two."""',
    '    """Run."""\n': "", "os.cpu_count() + LIMIT": "(\n        os.cpu_count()\n        + LIMIT\n    )",
    '{"total": total}': "{'total': total,}", "\n\n\n": "\n\n\n\n\n",
}  # fmt: skip
OTHER = {
    "LIMIT = 3": "LIMIT = 3.0", "rate=0.1": "rate=0.2", "@cache\n": "", "+ LIMIT": "- LIMIT",
    '{"total": total}': '{"Total": total}', "    total =": "    print()\n    total =",
}  # fmt: skip


def test_code_changes_the_digest_and_comments_and_layout_do_not(tmp_path: Path) -> None:
    whole = digest(CODE, tmp_path / "a.py")
    for changes, same in ((SAME, True), (OTHER, False)):
        for old, new in changes.items():
            assert (digest(CODE.replace(old, new, 1), tmp_path / "b.py") == whole) == same, old
