"""Packaging: package list, data files, locks, and the wheel."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kit.docs import COMMANDS, write_files

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The last two by links in the first.
PACKAGE_DIR = {"mlxchat": "src/mlxchat", "mlxchat.conf": "conf", "mlxchat.stages": "stages"}
PACKAGE_DATA = PYPROJECT["tool"]["setuptools"]["package-data"]
LOCKS = sorted(path.name for path in ROOT.glob("requirements*.lock"))
CACHES = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def lock_entries(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return package -> (version, sha256 hashes) of a lock file; every package is there once."""
    entries: dict[str, tuple[str, list[str]]] = {}
    package = ""
    for line in (ROOT / name).read_text().splitlines():
        if pin := re.match(r"([a-z0-9-]+)==(\S+)", line):
            package = pin[1]
            assert package not in entries, f"{package} is twice in {name}"
            entries[package] = (pin[2], [])
        elif digest := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})( \\)?", line):
            entries[package][1].append(digest[1])
        else:
            assert not line.strip() or line.lstrip().startswith("#"), f"{name}: unexpected line {line!r}"
    return entries


def copy_sources(target: Path) -> Path:
    """Copy what a build reads, so that building leaves nothing in the checkout."""
    target.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", PYPROJECT["project"]["readme"], "LICENSE"):
        shutil.copy2(ROOT / name, target / name)
    for folder in PACKAGE_DIR.values():
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=shutil.ignore_patterns(*CACHES))
    return target


def run(command: list[str | Path], folder: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def build_wheel(folder: Path) -> Path:
    """Build the sdist and from it the wheel, with the setuptools at hand, without network; return the wheel."""
    sources, wheels = copy_sources(folder / "sources"), folder / "wheels"
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", wheels, sources], folder)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def test_locks_are_complete_with_hashes_and_no_index():
    for name in LOCKS:
        text, entries = (ROOT / name).read_text(), lock_entries(name)
        # Not a bare "http": httpx2 is the name of a package.
        assert [word for word in ("://", "index-url", "find-links", "trusted-host", " @ ") if word in text] == []
        assert entries
        assert [package for package, (_, hashes) in entries.items() if not hashes] == []


@pytest.mark.parametrize("extra", ["test", "docs"])
def test_lock_satisfies_every_requirement(extra):
    locked = lock_entries("requirements.lock") | (lock_entries("requirements-docs.lock") if extra == "docs" else {})
    project = PYPROJECT["project"]
    needed = map(Requirement, [*project["dependencies"], *project["optional-dependencies"][extra]])
    version = {name: pin for name, (pin, _) in locked.items()}
    assert [str(each) for each in needed if not each.specifier.contains(version[canonicalize_name(each.name)])] == []


def test_wheel_carries_configuration_and_stages(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
    expected = set()
    for package, folder in PACKAGE_DIR.items():
        below = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        kept = (path for path in below if not set(CACHES) & set(path.parts))
        expected |= {f"{package.replace('.', '/')}/{path.as_posix()}" for path in kept}
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command mlxchat of an environment into which the wheel was installed, far from the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(folder)
    python = folder / "venv" / "bin" / "python"
    # The wheel's own metadata says what to install, the lock only which versions.
    pins = folder / "pins.txt"
    locked = lock_entries("requirements.lock")
    pins.write_text("".join(f"{name}=={version}\n" for name, (version, _) in locked.items()))
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    run([python, "-m", "pip", "install", "--quiet", "-c", pins, str(wheel), "setuptools", "wheel"], folder)
    return python.with_name("mlxchat")


@pytest.mark.slow
def test_wheel_runs_outside_the_checkout(installed, tmp_path):
    run([installed, "experiment=smoke", f"outputs={tmp_path / 'outputs'}"], tmp_path)
    assert list((tmp_path / "outputs" / "store").glob("*/manifest.json"))


@pytest.mark.slow
def test_examples_of_own_parts_run_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    write_files(tmp_path)
    for command in COMMANDS:
        run([installed, *command], tmp_path)
    run([installed.with_name("pip"), "install", "--quiet", "--no-build-isolation", "./package"], tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run([installed, "experiment=verse"], tmp_path / "elsewhere")
    assert len(list(tmp_path.glob("**/outputs/store/rhyme-*/text.txt"))) == 1
    assert "finished" in (tmp_path / "outputs" / "printed.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "command"),
    [("uvx", ("uvx", "--from", "{wheel}", "mlxchat")), ("pipx", ("pipx", "run", "--spec", "{wheel}", "mlxchat"))],
)
def test_wheel_runs_without_an_installation(program, command, tmp_path):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    wheel = str(build_wheel(tmp_path))
    (tmp_path / "empty").mkdir()
    start = [word.format(wheel=wheel) for word in command]
    run([*start, "experiment=smoke"], tmp_path / "empty")
    assert (tmp_path / "empty" / "outputs" / "refs" / "latest" / "rl").exists()
    run([*start, "chat", "-p", "Hello!"], tmp_path / "empty")
