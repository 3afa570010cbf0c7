"""The verbs of the command line."""

from __future__ import annotations

from collections.abc import Sequence

# Verb → (module of mlxchat.commands and the function in it that declares the verb's parser, what the verb does).
VERBS = {
    "run": ("run:run", "run the pipeline, or what `stage=` selects; this is what plain `mlxchat` does"),
    "plan": ("plan:plan", "show what would run, and why"),
    "explain": ("plan:explain", "show what a stage or step does, reads and writes, and its settings: explain sft"),
    "graph": ("plan:graph", "draw the pipeline (--format ascii, mermaid, dot or json)"),
    "status": ("inspect:status", "show what is running, failed and left over, and what is done in a run"),
    "ls": ("inspect:ls", "list the artifacts: all, or of a stage, a step or a run"),
    "show": ("inspect:show", "show everything about an artifact"),
    "samples": ("examples:samples", "show what a model wrote over the iterations of its training, while it runs, too"),
    "lineage": ("inspect:lineage", "show what an artifact was made from, and what was made from it"),
    "diff": ("inspect:diff", "show how two artifacts or runs differ: config, inputs, code, metrics, environment"),
    "compare": ("reports:compare", "compare runs, a sweep or a step's artifacts in a table (--sort, --format, --plot)"),
    "report": ("reports:report", "write and print the report of a run, of artifacts, or of several runs"),
    "pin": ("artifacts:pin", "name an artifact, which keeps it from being collected"),
    "verify": ("inspect:verify", "hash artifacts again and list what differs"),
    "gc": ("artifacts:gc", "show what may be removed and why; --apply removes it"),
    "rm": ("artifacts:rm", "show what goes with a run or an artifact; --apply removes it"),
    "push": (
        "artifacts:push",
        "copy artifacts or a run, with what they were made from, to a folder, tar file or URL",
    ),
    "pull": ("artifacts:pull", "take in artifacts that were pushed, from a folder, tar file or URL"),
    "export": ("models:export", "write a model for another tool: export ID --to hf|nanochat|mlx|mlx-adapter|peft PATH"),
    "import": ("models:import_model", "take in a model or adapters of another tool: import nanochat|hf|adapter WHAT"),
    "fuse": ("models:fuse", "put a model's adapters into its weights, which makes it a checkpoint of its own"),
    "chat": ("models:chat", "talk to a model (-p QUESTION for one answer)"),
    "serve": ("models:serve", "serve models over HTTP: OpenAI's interface, nanochat's, and a page to chat in"),
    "eval": (
        "evaluate:evaluate",
        "measure a model on a task or a suite: eval sft --task gsm8k --limit 100 --samples 8",
    ),
    "distill": ("distill:distill", "have a teacher behind an OpenAI-compatible endpoint answer questions to train on"),
    "data": ("data:data", "fetch, list, remove and show what comes from the Hub: data fetch|ls|rm|show"),
    "data fetch": ("data:fetch", "fetch everything that a run needs, so that it can run without a network"),
    "data ls": ("data:ls", "list what was fetched: files, size, revision, and the artifacts made from it"),
    "data rm": ("data:rm", "remove a repository or a download from this machine"),
    "data show": ("data:show", "show conversations of a mixture, suite or stage as a model sees them"),
    "bench": ("machine:bench", "measure how fast this machine works (bench train, bench core; --json for programs)"),
    "doctor": ("machine:doctor", "check device, BLAS, memory, versions and the outputs folder, and how to mend them"),
    "completion": ("completion:completion", "print a script with which bash, zsh or fish completes all of this"),
}
# Options of the configuration, which may stand before the verb, whose value is the next word.
_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb of a command line and its other arguments; "run" where no verb is given.

    Settings and options may stand before the verb: `mlxchat model=d4 plan`.
    """
    places = iter(range(len(arguments)))
    for place in places:
        for count in (2, 1):
            verb = " ".join(arguments[place : place + count])
            if verb in VERBS:
                return verb, [*arguments[:place], *arguments[place + count :]]
        word = arguments[place]
        if word in _WITH_VALUE:
            next(places, None)
        elif not word.startswith(("-", "~")) and "=" not in word:
            break
    return "run", list(arguments)
