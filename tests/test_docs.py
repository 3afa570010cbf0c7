"""README and docs: links work, commands are valid, those of README and course run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kit.commands import clean_environment
from kit.docs import DOCS, docs_module, fenced, write_files
from mlxchat.commands.arguments import parser_of
from mlxchat.composition.compose import compose_config, split_options
from mlxchat.config.verbs import VERBS, split_verb
from mlxchat.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("[ACS]*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"settings", "__pycache__", "sweep"}
# Options that a page adds itself.
OWN = {"town", "my_mixture", "words", "verse", "me", "reverse", "alphabet"}
# A setting that code on the page adds, a file to replace by one of yours, no setting of a run, a shell's variable.
# test_own_parts.py plans the files of its page, whose commands need its folder conf.
NOT_HERE = (
    "architecture.activation",
    "path/to/tokenizer.json",
    "data show mixture=",
    "$SLURM_ARRAY_TASK_ID",
    "-cd conf",
)
RUN = [PAGES[0], *sorted((ROOT / "docs" / "course").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Return the mlxchat command lines in fenced blocks and in code spans, with continued lines joined."""
    blocks = "\n".join(fenced(text, "bash|console|text")).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?(?:\S*/)?mlxchat\b(.*)$", blocks, re.M)
    spans = re.findall(r"`mlxchat\b([^`]*)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    return [line.split("  #")[0].split(" && ")[0] for line in lines + spans]


def lines(page: Path) -> list[str]:
    """Return the shell lines with a command of mlxchat in the fenced blocks of a page: all of bash, `$ ` of others."""
    text, found = page.read_text(encoding="utf-8").replace("\\\n", " "), []
    for kinds, line in (("bash", "^(.+)$"), ("console|text", r"^\$ (.+)$")):
        found += [each for block in fenced(text, kinds) for each in re.findall(line, block, re.M)]
    return [line for line in found if re.search(r"\bmlxchat\b", line) and not re.match("#|pip |make |python ", line)]


def words(line: str) -> list[str]:
    """Return the arguments of the first command of mlxchat in a shell line."""
    parts = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    parts.whitespace_split, parts.commenters = True, "#"
    found = list(parts)
    found = found[next(place for place, word in enumerate(found) if Path(word).name == "mlxchat") + 1 :]
    return found[: next((place for place, word in enumerate(found) if set(word) <= set(";&|<>")), None)]


def first_job(settings: list[str]) -> list[str]:
    """Return the settings of a sweep's first job."""
    kept = [setting for setting in settings if "(" not in setting]
    return [re.sub(r"(=[^\[{,]*),.*", r"\1", setting) for setting in kept]


def anchors(page: Path) -> list[str]:
    """Return the anchors of a page's titles."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_and_pictures_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path if path else page).resolve()
        if "://" in target:
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_existing_verbs_and_options(page):
    unknown = []
    for command in commands(page.read_text(encoding="utf-8")):
        words = command.replace("'", "").split()
        first = words[0] if words else "run"
        if re.fullmatch(r"[a-z]+", first) and first not in VERBS:
            unknown.append(f"mlxchat{command}")
        for group, option in re.findall(r"(?<![\w.])(\w+)(?:@[\w.]+)?=([\w,…]+)", command):
            if group not in GROUPS:
                continue
            for name in option.split(","):
                deep = group == "model" and re.fullmatch(r"d\d+", name)
                if not (deep or name in OWN or name in ("NAME", "…") or (CONF / group / f"{name}.yaml").is_file()):
                    unknown.append(f"{group}={name}")
    assert unknown == []


@pytest.mark.parametrize("script", [path.stem for path in DOCS.glob("*.py") if path.stem != "hooks"])
def test_scripts_of_the_docs_import_what_exists(script):
    docs_module(script)


COMMANDED = [page for page in PAGES if lines(page)]


@pytest.mark.parametrize("page", COMMANDED, ids=[str(page.relative_to(ROOT)) for page in COMMANDED])
def test_commands_in_blocks_are_parsed(page):
    for line in lines(page):
        verb, rest = split_verb(words(line))
        parser_of(verb).read(rest)


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDED, ids=[str(page.relative_to(ROOT)) for page in COMMANDED])
def test_settings_in_blocks_are_composed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (ROOT / "docs" / "guides" / "own_parts.md", page):  # other guides use its reward
        write_files(tmp_path, source.read_text(encoding="utf-8"))
    Path("texts").mkdir(exist_ok=True)
    for name in ("mine", "me", "gsm8k_teacher", "pairs", "other"):
        Path(f"{name}.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    for line in lines(page):
        verb, rest = split_verb(words(line))
        options = parser_of(verb).read(rest)
        if not options.settings or not parser_of(verb).composes or any(word in line for word in NOT_HERE):
            continue
        settings = options.settings
        if "-m" in rest or any(setting.startswith("sweep=") for setting in settings):
            settings = first_job(settings)
        try:
            compose_config(*split_options(settings))
        except ConfigError as error:
            if ": pip install " not in str(error):
                raise


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which README's and the course's commands run, one after the other."""
    return tmp_path_factory.mktemp("student")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=[page.name for page in RUN])
def test_commands_run(page, student):
    write_files(student, page.read_text(encoding="utf-8"))
    environ = clean_environment(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    commands = ["mlxchat experiment=smoke"] if page == RUN[0] else []
    for block in fenced(page.read_text(encoding="utf-8"), "bash|console"):
        commands += [
            line.removeprefix("$ ").replace(".venv/bin/", "") for line in block.replace("\\\n", " ").splitlines()
        ]
    for command in [line for line in commands if not line.startswith(("make ", "pip "))]:
        done = subprocess.run(
            ["bash", "-c", command], cwd=student, env=environ, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
