"""mlxchat completion: a script that makes a shell complete verbs, options, groups and names of artifacts."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from mlxchat.commands.arguments import Parser
from mlxchat.config.schema import MODELS
from mlxchat.store.naming import IMPORTS, LATEST, PINS, called, latest, links, runs
from mlxchat.store.store import Store

_BASH = r"""_mlxchat() {
    local IFS=$'\n' word="${COMP_WORDS[COMP_CWORD]}" line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=()
    # Bash breaks words at = and :, mlxchat does not.
    local whole="${line##*[[:space:]]}"
    local cut="${whole%"$word"}"
    local found
    for found in $("${COMP_WORDS[0]}" _complete "$line" 2>/dev/null); do
        COMPREPLY+=("${found#"$cut"}")
    done
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _mlxchat mlxchat
"""
_ZSH = r"""#compdef mlxchat
_mlxchat() {
    local -a found
    found=("${(@f)$(${words[1]} _complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    compadd -Q -S '' -- ${found:#}
}
if [[ $funcstack[1] == _mlxchat ]]; then _mlxchat "$@"; else compdef _mlxchat mlxchat; fi
"""
_FISH = r"""complete -c mlxchat -e
complete -c mlxchat -a '(mlxchat _complete (commandline -cp) 2>/dev/null)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_PLACES = """To use it:
  bash   eval "$(mlxchat completion bash)"      in ~/.bashrc
  zsh    eval "$(mlxchat completion zsh)"       in ~/.zshrc, after compinit
  fish   mlxchat completion fish > ~/.config/fish/completions/mlxchat.fish"""

# Verbs that take names of artifacts, and those that take settings of the configuration.
_NAMING = ("chat", "show", "lineage", "diff", "pin", "verify", "export", "fuse", "report", "serve")
_SETTING = ("run", "plan", "graph", "bench", "data")
_DATA = ("fetch", "ls", "rm", "show")
_OPTIONS = {
    "run": ["--multirun", "--cfg", "--info", "--config-dir", "--config-name", "--config-path", "--fail-fast", "--help"],
    "plan": ["--json", "--exit-code", "--config-dir"],
    "explain": ["--json"], "status": ["--json"], "ls": ["--stage", "--sort", "--json"],
    "show": ["--json", "--examples", "--task", "--iteration"],
    "lineage": ["--up", "--down", "--json"],
    "diff": ["--json"], "pin": ["--remove", "--json"], "verify": ["--json"],
    "export": ["--to", "--quantize", "--dtype", "--push", "--public", "--force"],
    "import": ["--forget"], "import hf": ["--name", "--revision", "--chat", "--base", "--replace"],
    "import adapter": ["--base", "--name", "--revision", "--chat", "--replace"],
    "import nanochat": ["--name", "--revision", "--step", "--chat", "--base", "--replace"],
    "gc": ["--apply", "--keep-last", "--older-than", "--max-bytes", "--json"],
    "compare": ["--step", "--last", "--sort", "--metrics", "--format", "--plot"], "graph": ["--format", "--config-dir"],
    "chat": ["--prompt", "--model", "--system", "--temperature", "--top-k", "--top-p", "--max-tokens", "--seed",
             "--bits", "--kv-bits", "--python-tool"],
    "serve": [
        "--host", "--port", "--api-key", "--cors", "--temperature", "--top-k", "--grace-seconds", "--log-requests",
        "--max-tokens", "--max-messages", "--max-message-chars", "--max-conversation-chars", "--max-choices",
        "--max-rows", "--max-queue", "--max-models", "--kept-tokens", "--bits", "--kv-bits", "--python-tool",
    ],
    "distill": [
        "--teacher", "--model", "--key-env", "--out", "--overwrite", "--questions", "--fill", "--task", "--split",
        "--option", "--start", "--size", "--system", "--temperature", "--top-p", "--max-tokens", "--samples", "--seed",
        "--body", "--only-correct", "--contains", "--keep-system", "--keep-cut", "--keep-thoughts", "--concurrency",
        "--rpm", "--tpm", "--retries", "--timeout", "--price-in", "--price-out", "--max-cost", "--cache",
        "--refresh", "--dry-run",
    ],
    "report": ["--run", "--out", "--cost-per-hour", "--open"],
    "bench": ["--json", "--config-dir"], "doctor": ["--hosts", "--seconds"],
    "data fetch": ["--dry-run", "--files", "--model", "--revision", "--workers"],
    "data ls": ["--json"], "data rm": ["--dry-run", "--force"],
    "data show": ["--count", "--start", "--task", "--seed", "--validation", "--tokenizer", "--config-dir"],
}  # fmt: skip
_FORMATS = {"graph": ("ascii", "mermaid", "dot", "json"), "compare": ("table", "csv", "json", "md")}


def main(arguments: list[str]) -> int:
    """Print the script for a shell."""
    from argparse import RawDescriptionHelpFormatter

    parser = Parser(
        prog="mlxchat completion", description="Print a script that makes a shell complete mlxchat's words.",
        epilog=_PLACES, formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("shell", choices=_SCRIPTS)
    print(_SCRIPTS[parser.parse_args(arguments).shell], end="")
    return 0


def main_complete(arguments: list[str]) -> int:
    """Print what the last word of a command line may become, one a line. Never fails: a shell is waiting."""
    try:
        for word in complete(arguments[0] if arguments else ""):
            print(word)
    except Exception:
        return 1
    return 0


def complete(line: str) -> list[str]:
    """Return the words that the last word of a command line may become."""
    words = line.split()[1:]
    current = "" if not words or line[-1:].isspace() else words.pop()
    from mlxchat.config.verbs import VERBS

    verb = words[0] if words and words[0] in VERBS else "run"
    previous = words[-1] if words else ""
    outputs = next((word[8:] for word in reversed(words) if word.startswith("outputs=")), "outputs")
    if previous == "--format":
        found = list(_FORMATS.get(verb, ()))
    elif previous == "--stage":
        found = sorted({name.split("-")[0] for name in _names(Path(outputs) / "store")})
    elif verb == "export" and previous == "--to":
        from mlxchat.commands.models import FORMATS

        found = list(FORMATS)  # a shell completes folders where none of these fits
    elif (
        (previous in ("--model", "--remove") and verb != "distill")
        or (previous == "--base" and words[:2] == ["import", "adapter"])
        or (verb in _NAMING and not current.startswith("-") and "=" not in current)
    ):
        found = [*_artifacts(Path(outputs), current), "outputs="]
    elif verb == "distill" and not current.startswith("-"):
        found = _tasks() if previous == "--task" else []  # else the shell completes files
    elif current.startswith("-"):
        found = [*_OPTIONS.get(" ".join(words[:2]), _OPTIONS.get(verb, [])), "--help"]
    elif verb == "data" and len(words) == 1:
        found = list(_DATA)
    elif verb == "import" and len(words) == 1:
        found = [*(key.partition(" ")[2] for key in _OPTIONS if key.startswith("import ")), "outputs="]
    elif verb == "bench" and len(words) == 1:
        from mlxchat.commands.machine import KINDS

        found = list(KINDS)
    elif verb == "completion":
        found = list(_SCRIPTS)
    elif verb in _SETTING:
        found = [*(VERBS if not words else ()), *_settings(current, words), "outputs="]
    else:
        found = ["outputs="]
    return sorted({word for word in found if word.startswith(current)})


def _artifacts(outputs: Path, current: str) -> list[str]:
    store = Store(outputs)
    if "/" in current:
        group = current.rpartition("/")[0]
        return [f"{group}/{step}" for step in links(store, latest(store) if group == LATEST else group)]
    named = [*links(store, latest(store)), *links(store, PINS), *links(store, IMPORTS)]
    names = _names(outputs / "store") if current else []
    every = [f"{name}{end}" for name in runs(store) for end in ("", "/")] if current else []
    every += sorted({called(name) for name in runs(store)})
    ids = [name[-16:] for name in names]
    return [*named, *names, *every, *ids]


def _settings(current: str, words: list[str]) -> list[str]:
    conf = _conf()
    own = _own_sections(words)
    group, equals, _ = current.lstrip("+").partition("=")
    if equals:
        group = group.partition("@")[0]
        names = [name[:-5] for name in _names(conf / group) if name.endswith(".yaml")]
        if group == "model":
            names = MODELS
        elif group == "stage":
            from mlxchat.runner.stage import stage_files

            names = ["all", *stage_files(), *own]
        return [f"{current.partition('=')[0]}={name}" for name in names]
    others = ("settings", "hydra", "__pycache__")
    groups = ["stage=", *(f"{name}=" for name in _names(conf) if (conf / name).is_dir() and name not in others)]
    groups += [f"hydra/{name}=" for name in _names(conf / "hydra")]
    keys = [f"{name}.{key}" for name, names in own.items() for key in names] if current else []
    return [*groups, *(key if key.endswith(".") else f"{key}=" for key in [*_keys(conf, current), *keys])]


def _own_sections(words: list[str]) -> dict[str, list[str]]:
    """Return own stage → its settings, where `stages=` names some."""
    if not any(word.startswith("stages=") for word in words):
        return {}
    from dataclasses import fields

    from mlxchat.composition.compose import places_of_stages
    from mlxchat.composition.sections import schema_of
    from mlxchat.runner.stage import Stages

    places = places_of_stages(words, [])
    settings = {item.name: item.type for item in fields(schema_of(places))}
    return {
        name: [item.name for item in fields(settings[name])] if stage.settings else []  # type: ignore[arg-type]  # of an own stage, the type is its dataclass
        for name, stage in Stages(places).own.items()
    }


def _keys(conf: Path, current: str) -> list[str]:
    """Return the dotted keys below what was typed, as the files of conf/settings spell them."""
    section = current.partition(".")[0]
    if "." not in current:
        return (
            ["seed", "data_seed", "force", "name", *(f"{name[:-5]}." for name in _names(conf / "settings"))]
            if current
            else []
        )
    try:
        lines = (conf / "settings" / f"{section}.yaml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found, trail = [], [section]
    for line in lines:
        match = re.match(r"( *)(\w+):(.*)", line)
        if match and match[2] != "defaults":
            trail = [*trail[: len(match[1]) // 2 + 1], match[2]]
            found.append(".".join(trail))
    return found


def _tasks() -> list[str]:
    from mlxchat.tasks import task_names

    return task_names()


def _conf() -> Path:
    spec = find_spec("mlxchat.conf")
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else Path("conf")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name[0] not in "._")  # noqa: PTH208
    except OSError:
        return []
