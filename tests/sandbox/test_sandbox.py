"""Hostile programs fail without harm; honest ones pass."""

import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from kit.commands import processes_in, wait_until
from mlxchat.sandbox.programs import PROTECTIONS, mac_profile, protections_here, run_program

HONEST = {
    "nothing": "",
    "a test that holds": "def f(x):\n    return x + 1\ndef check(g):\n    assert g(1) == 2\ncheck(f)",
    "the modules that answers import": (
        "import math, re, typing, hashlib, collections, heapq, itertools, functools, random, datetime, string, copy\n"
        "import statistics, fractions, decimal, bisect, operator, json, dataclasses, enum, abc, sys, os, time, struct\n"
        "assert hashlib.md5(b'').hexdigest().startswith('d41d8')"
    ),
    "files in the folder": (
        "import os\nos.mkdir('a')\nopen('a/b', 'w').write('text')\nassert open('a/b').read() == 'text'\n"
        "os.remove('a/b')\nos.rmdir('a')\nassert os.listdir('.') == []"
    ),
    "threads": (
        "import threading, queue\nq = queue.Queue()\n"
        "ts = [threading.Thread(target=q.put, args=(i,)) for i in range(4)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\nassert sorted(q.queue) == [0, 1, 2, 3]"
    ),
    "a signal to itself": "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *a: None)\n"
    "os.kill(os.getpid(), signal.SIGUSR1)",
}

TRY_ALL_FILES = "import os\nfor fd in range(1, 4096):\n    try:\n        {what}\n    except OSError:\n        pass\n"
HOSTILE = {
    # Early ends
    "an error": "assert 1 == 2",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "an infinite loop": "while True:\n    pass",
    "an infinite loop that catches everything": (
        "import signal\nfor s in range(1, 32):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError:\n        pass\nwhile True:\n    try:\n        while True:\n            pass\n"
        "    except BaseException:\n        pass"
    ),
    "sleep": "import time\ntime.sleep(60)",
    # Too much
    "a memory bomb": "b = bytearray(1 << 30)",
    "a growing memory bomb": "a = []\nwhile True:\n    a.append(bytearray(1 << 20))",
    "huge output": "while True:\n    print('x' * 10_000)",
    "a huge file": "f = open('f', 'wb')\nfor _ in range(100):\n    f.write(bytes(1 << 20))\nf.close()",
    # Other processes
    "a fork bomb": "import os\nfor _ in range(6):\n    os.fork()\nimport time\ntime.sleep(60)",
    "a child that outlives it": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "    os._exit(0)\nos._exit(0)"
    ),
    "a shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'sleep 60'], check=True)",
    "a signal to the parent": "import os\nos.kill(os.getppid(), 15)",
    "another program in its place": "import os\nos.execv('/bin/true', ['true'])",
    # Outside
    "writing outside": "open({outside!r}, 'w').write('x')",
    "overwriting what is there": "open({existing!r}, 'w').write('x')",
    "removing what is there": "import os\nos.remove({existing!r})",
    "a link to what is there": "import os\nos.symlink({existing!r}, 'a')\nopen('a', 'w').write('x')",
    "reading what is there": "assert open({existing!r}).read() == ''",
    "deleting its folder": "import os, shutil\nshutil.rmtree(os.getcwd())",
    "reading the environment": "import os\nos.environ['MLXCHAT_SECRET']",
    "reading its parent's memory": "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb')",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    # The verdict
    "closing all files": "import os\nos.closerange(0, 4096)",
    "saying passed everywhere": TRY_ALL_FILES.format(what="os.write(fd, b'passed\\n')"),
    "asking the question itself": (
        "import gc, os, sys\nframe, holders = sys._getframe(), gc.get_objects()\nwhile frame:\n"
        "    holders += [frame.f_locals, frame.f_globals]\n    frame = frame.f_back\n"
        "texts = [v for o in holders for v in gc.get_referents(o) if isinstance(v, (str, bytes)) and len(v) == 32]\n"
        "for text in texts:\n    for fd in range(3, 4096):\n        try:\n"
        "            os.write(fd, text if isinstance(text, bytes) else text.encode())\n"
        "        except OSError:\n            pass\nos._exit(0)"
    ),
    "replaced functions": (
        "import builtins, os, sys\nos._exit = sys.exit = builtins.exit = lambda *a: None\n"
        "os.write = os.read = lambda *a: 1\nbuiltins.compile = builtins.exec = None\nraise SystemExit(0)"
    ),
}  # fmt: skip


# Words of the programs that limits alone cannot stop.
CONFINED = ("outside", "what is there", "its folder", "parent", "shell", "another program")


@pytest.fixture(scope="module", autouse=True)
def many_open_files() -> Iterator[None]:
    """Programs must find their pipes where a test process with many open files puts them, too."""
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(Path(os.devnull).open())
        yield


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The parent of the programs' folders; it must be empty and unused at the end."""
    place = tmp_path / "programs"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("MLXCHAT_SECRET", "a secret")
    yield place
    assert list(place.iterdir()) == []
    # A killed process may take a moment to disappear.
    wait_until(lambda: processes_in(place) == [], seconds=2)


@pytest.mark.parametrize("protections", [PROTECTIONS, ()], ids=["all", "none"])
def test_honest_programs_pass(protections):
    run = partial(run_program, seconds=20, protections=protections)
    with ThreadPoolExecutor(4) as pool:
        for name, outcome in zip(HONEST, pool.map(run, HONEST.values()), strict=True):
            assert (outcome.passed, outcome.status) == (True, "passed"), (name, outcome.output)
            assert set(outcome.protections) <= {"limits", *protections}


def test_hostile_programs_fail_without_harm(tmp_path):
    """Several run at a time, each with a file outside its folder that it may attack."""
    parent = os.getpid(), Path.cwd(), dict(os.environ)
    confined = {"seccomp", "landlock"} <= set(protections_here())

    def check(name: str) -> str | None:
        around = tmp_path / f"around{[*HOSTILE].index(name)}"
        around.mkdir()
        existing = around / "existing"
        existing.write_text("unchanged")
        existing.chmod(0o640)
        code = HOSTILE[name]
        if "{" in code:
            places = {"outside": str(around / "outside"), "existing": str(existing), "folder": str(around)}
            code = code.format(**places, port=1)
        outcome = run_program(code, seconds=0.5)
        assert outcome.status in ("passed", "failed", "timeout", "memory", "output"), name
        assert [path.name for path in around.iterdir()] == ["existing"], name
        assert existing.read_text() == "unchanged", name
        assert existing.stat().st_mode & 0o777 == 0o640, name
        assert "a secret" not in outcome.output, name
        return name if outcome.passed else None

    with ThreadPoolExecutor(4) as pool:
        passed = [
            *pool.map(check, (name for name in HOSTILE if confined or not any(word in name for word in CONFINED)))
        ]
    assert [name for name in passed if name] == []
    assert not [path for path in tmp_path.iterdir() if path.name != "programs" and not path.name.startswith("around")]
    assert (os.getpid(), Path.cwd(), dict(os.environ)) == parent


def test_status_names_the_cause_and_output_is_bounded():
    causes = {"sleep": "timeout", "a memory bomb": "memory", "huge output": "output", "sys.exit(0)": "failed"}
    outcomes = {name: run_program(HOSTILE[name], seconds=0.5 if name == "sleep" else 20) for name in causes}
    assert {name: outcome.status for name, outcome in outcomes.items()} == causes
    assert len(outcomes["huge output"].output) <= 1 << 14
    assert 0.4 < outcomes["sleep"].seconds < 5, "wall-clock time"
    failed = run_program("print('before')\nraise ValueError('the reason')")
    assert failed.output.startswith("before\n")
    assert failed.output.endswith('File "<program>", line 2, in <module>\nValueError: the reason\n')


def test_program_has_an_empty_folder_and_the_standard_library():
    code = "import os\nassert not os.environ and os.listdir('.') == []\n"
    code += "for name in ('mlxchat', 'numpy', 'execution', 'seccomp'):\n    try:\n        __import__(name)\n"
    assert run_program(code + "    except ImportError:\n        continue\n    raise SystemExit(name)").passed


def test_memory_limit_is_exact():
    code = "b = bytearray(80 << 20)"
    assert run_program(code, seconds=20, memory_bytes=256 << 20).passed
    assert run_program(code, seconds=20, memory_bytes=64 << 20).status == "memory"


def test_hostile_programs_fail_without_protections():
    names = [
        "sys.exit(0)", "os._exit(0)", "an infinite loop that catches everything", "a growing memory bomb",
        "huge output", "a huge file", "a fork bomb", "a shell", "reading the environment",
        "deleting its folder", "closing all files", "saying passed everywhere",
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        run = partial(run_program, seconds=0.5, protections=())
        passed = [outcome.passed for outcome in pool.map(run, (HOSTILE[name] for name in names))]
    assert passed == [False] * len(names)


def test_mac_profile_allows_writes_only_in_the_folder():
    rules = mac_profile(Path("/private/tmp/mine"))
    assert re.findall(r"\(allow file-write\S* \((\S+) ([^)]+)\)", rules) == [
        ("subpath", '"/private/tmp/mine"'), ("literal", '"/dev/null"'),
    ]  # fmt: skip
    assert "(deny network*)" in rules
    assert rules.count("(") == rules.count(")")
