"""What the command line can do."""

# Verb → (module in mlxchat.commands and its function, what it does).
VERBS = {
    "run": ("run:run", "run the pipeline, or what `stage=` selects; this is what plain `mlxchat` does"),
    "plan": ("plan:plan", "show what would run, and why"),
    "explain": ("plan:explain", "show what a stage or step does, reads and writes, and its settings: explain sft"),
    "status": ("inspect:status", "show what is running, failed and left over, and what is done in a run"),
    "ls": ("inspect:ls", "list the artifacts: all, or of a stage, a step or a run"),
    "show": ("inspect:show", "show everything about an artifact"),
    "lineage": ("inspect:lineage", "show what an artifact was made from, and what was made from it"),
    "diff": ("inspect:diff", "show how two artifacts or runs differ: config, inputs, code, metrics, environment"),
    "compare": ("reports:compare", "compare runs, a sweep or a step's artifacts in a table (--sort, --format, --plot)"),
    "pin": ("artifacts:pin", "name an artifact, which keeps it from being collected"),
    "verify": ("inspect:verify", "hash artifacts again and list what differs"),
    "gc": ("artifacts:gc", "show what may be removed and why; --apply removes it"),
    "export": (
        "models:export",
        "copy artifacts and what they were made from, or write a model for other tools (--to)",
    ),
    "import": ("artifacts:main_import", "take in exported artifacts, or what others made: import nanochat|hf|adapter"),
    "fuse": ("models:fuse", "put a model's adapters into its weights, which makes it a checkpoint of its own"),
    "data": ("data:data", "fetch, list, remove and look at what comes from the Hub: data fetch|ls|rm|show"),
    "chat": ("models:chat", "talk to a model (-p QUESTION for one answer)"),
    "serve": ("models:serve", "serve models over HTTP: OpenAI's interface, nanochat's, and a page to chat in"),
    "distill": ("distill:main", "have a teacher behind an OpenAI-compatible endpoint answer questions to train on"),
    "report": ("reports:report", "write and print the report of a run, of artifacts, or of several runs"),
    "graph": ("plan:graph", "draw the pipeline (--format ascii, mermaid, dot or json)"),
    "bench": ("machine:bench", "measure how fast this machine works (bench train, bench core; --json for programs)"),
    "completion": ("completion:main", "print a script with which bash, zsh or fish completes all of this"),
    "doctor": ("machine:doctor", "check device, BLAS, memory, versions and the outputs folder, and say how to mend it"),
}
