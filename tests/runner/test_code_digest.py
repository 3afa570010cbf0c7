"""Code digests: which modules a stage uses, what changes a digest, and the settings of `code`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.toys import CHAIN, started
from mlxchat.errors import Interrupted
from mlxchat.runner import keys
from mlxchat.runner.keys import CodeDigests, changed_modules
from mlxchat.runner.stage import Stages

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


def test_closure_follows_all_kinds_of_imports(tree):
    assert list(modules(tree)) == [
        "model/__init__.py", "model/gpt.py", "ops/__init__.py", "ops/late.py", "ops/norm.py", "stages/train.py",
        "tasks/__init__.py", "tasks/facts.csv", "tasks/sums.py", "tasks/texts/one.txt",
    ]  # fmt: skip


def test_closure_has_every_module_that_python_imports(tmp_path):
    code = "import sys, mlxchat.stages.sft; print(*[m.__file__ for n, m in sys.modules.items() if n[:8] == 'mlxchat.'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    library = ROOT / "src" / "mlxchat"
    loaded = {Path(path) for path in done.stdout.split() if path != "None"}
    names = {str(path.relative_to(library)) for path in loaded if path.is_relative_to(library)}
    computing = {name for name in names if not keys.computes_nothing(name.removesuffix(".py").split("/")[0])}
    found = CodeDigests(Path("/none/index/x"), library).of_stage(Stages()["sft"].path)
    # cpu/__init__.py is imported by the package itself, before any stage.
    assert computing - set(found) <= {"cpu/__init__.py"}


def test_changes_are_named_by_their_modules(tree):
    before = modules(tree)
    for name in ("ops/unused.py", "typed.py", "errors.py", "runner/context.py", "tasks/unread.csv"):
        (tree / "mlxchat" / name).write_text("raise SystemExit\n")
        assert modules(tree) == before, name
    for name, text in (
        ("ops/late.py", "RATE = 1.0\n"), ("tasks/facts.csv", "1,3\n"), ("tasks/texts/one.txt", "two\n"),
        ("tasks/new.py", ""), ("model/gpt.py", "SCALE = 2\n"),
    ):  # fmt: skip
        now = modules(tree)
        (tree / "mlxchat" / name).write_text(text)
        gone = ["ops/norm.py"] if name == "model/gpt.py" else []  # it was imported there alone
        assert changed_modules(now, modules(tree)) == [name, *gone]


def states(toys: Any, code: str) -> dict[str, tuple[str, str]]:
    return {step.name: (step.state, step.reason) for step in toys.plan(CHAIN, code=code)}


def test_changed_code_is_reported_and_reruns_only_if_strict(toys):
    toys.run(toys.plan(CHAIN))
    key = toys.plan(CHAIN)[0].key
    assert list(toys.store.made(key)["code"]["modules"]) == ["stages/make.py"]
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
def test_saved_state_of_other_code_is_reported_and_discarded_only_if_strict(policy: str, seen: str, toys: Any) -> None:
    saved = "state = ctx.work / 'state'\nstate.parent.mkdir(exist_ok=True)\n"
    toys.add("make", saved + "state.write_text('old ')\nraise ctx.stop('iteration 1')")
    with pytest.raises(Interrupted):
        toys.run(toys.plan(CHAIN, code=policy))
    before = "missing, resumes"
    assert states(toys, policy)["one"] == ("run", before)
    toys.add("make", saved + "old = state.read_text() if state.exists() else ''\n"
             "(ctx.out / 'result.txt').write_text(old + 'new')")  # fmt: skip
    changed = "code changed (stages/make.py)"
    reason = {"warn": f"missing, resumes: {changed}", "strict": f"missing, starts again: {changed}"}.get(policy, before)
    assert states(toys, policy)["one"] == ("run", reason)
    step = toys.plan(CHAIN, code=policy)[0]
    toys.run(toys.plan(CHAIN, code=policy))
    assert (toys.outputs / "store" / toys.store.made(step.key)["name"] / "result.txt").read_text() == seen


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


def test_code_changes_the_digest_and_comments_and_layout_do_not(tmp_path):
    whole = digest(CODE, tmp_path / "a.py")
    assert whole == "4dab1a537b852cee", "in every Python"
    for changes, same in ((SAME, True), (OTHER, False)):
        for old, new in changes.items():
            assert (digest(CODE.replace(old, new, 1), tmp_path / "b.py") == whole) == same, old
