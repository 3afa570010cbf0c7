"""The verbs of the command line."""

from collections.abc import Sequence

# Verb → (module:function of mlxchat.commands that declares the verb's parser, description); _function is the verb.
VERBS = {
    "run": ("run:run", "run the pipeline, or what `stage=` selects; this is what plain `mlxchat` does"),
    "plan": ("run:plan", "show what would run, and why (--graph draws the pipeline)"),
    "status": ("inspect:status", "show steps that are running, failed, unfinished and done"),
    "ls": ("inspect:ls", "list the artifacts: all, or of a stage, a step or a run"),
    "show": ("inspect:show", "show everything about an artifact, its examples or samples"),
    "lineage": ("inspect:lineage", "show an artifact's inputs and the artifacts made from it"),
    "diff": ("inspect:diff", "show how two artifacts or runs differ: config, inputs, code, metrics, environment"),
    "compare": ("reports:compare", "compare runs, or the jobs of a sweep, in a table (--sort, --format)"),
    "report": ("reports:report", "write and print the report of a run, a sweep or an artifact"),
    "pin": ("artifacts:pin", "name an artifact and protect it from gc"),
    "verify": ("inspect:verify", "hash artifacts again and list differences from their manifests"),
    "gc": ("artifacts:gc", "list artifacts that may be removed, and why; --apply removes them"),
    "rm": ("artifacts:rm", "list what removing a run or an artifact removes; --apply removes it"),
    "push": ("artifacts:push", "copy artifacts or a run, with their inputs, to a folder or URL"),
    "pull": ("artifacts:pull", "import pushed artifacts from a folder or URL"),
    "export": ("models:export", "write a model for another tool: export ID --to hf|nanochat|mlx|mlx-adapter|peft PATH"),
    "import": ("models:import_model", "import a model or adapters of another tool: import nanochat|hf|adapter WHAT"),
    "chat": ("models:chat", "chat with a model (-p QUESTION for one answer)"),
    "serve": ("models:serve", "serve models over HTTP: OpenAI's API and a chat page"),
    "eval": ("evaluate:evaluate", "evaluate a model on a task or suite: eval sft --task gsm8k --limit 100 --samples 8"),
    "distill": ("data:distill", "collect a teacher's answers from an OpenAI-compatible endpoint, to train on"),
    "data": ("data:data", "download and show data of the Hub: data fetch|show"),
    "data fetch": ("data:fetch", "download everything that a run needs, so that it can run offline"),
    "data show": ("data:show", "show conversations of a mixture, suite or stage as the model reads them"),
    "bench": ("machine:bench", "measure this machine's speed (bench train, bench generate; --json for programs)"),
    "doctor": ("machine:doctor", "check device, BLAS, memory, versions and the outputs folder, and suggest fixes"),
    "completion": ("completion:completion", "print a completion script for bash, zsh or fish"),
}
# Options of the configuration that take the next word as their value; they may precede the verb.
_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")


def split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb of a command line and its other arguments; "run" where no verb is given.

    Settings and options may precede the verb: `mlxchat model=d4 plan`.
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
