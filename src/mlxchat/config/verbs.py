"""What the command line can do."""

# Verb → (module in mlxchat.commands, with its function if that is not main; what it does).
VERBS = {
    "run": ("run", "run the pipeline, or what `stage=` selects; this is what plain `mlxchat` does"),
    "plan": ("plan", "show what would run, and why"),
    "explain": ("explain", "show what a stage or step does, reads and writes, and its settings: explain sft"),
    "status": ("status", "show what is running, failed and left over, and what is done in a run"),
    "ls": ("ls", "list the artifacts: all, or of a stage, a step or a run"),
    "show": ("show", "show everything about an artifact"),
    "lineage": ("lineage", "show what an artifact was made from, and what was made from it"),
    "diff": ("diff", "show how two artifacts or runs differ: config, inputs, code, metrics, environment"),
    "compare": ("compare", "compare runs, a sweep or a step's artifacts in a table (--sort, --format, --plot)"),
    "pin": ("pin", "name an artifact, which keeps it from being collected"),
    "verify": ("verify", "hash artifacts again and list what differs"),
    "gc": ("gc", "show what may be removed and why; --apply removes it"),
    "export": ("export", "copy artifacts and all they were made from, or write a model for other tools (--to hf, …)"),
    "import": ("transfer:main_import", "take in exported artifacts, or what others made: import nanochat|hf|adapter"),
    "fuse": ("fuse", "put a model's adapters into its weights, which makes it a checkpoint of its own"),
    "data": ("data", "fetch, list, remove and look at what comes from the Hub: data fetch|ls|rm|show"),
    "chat": ("chat", "talk to a model (-p QUESTION for one answer)"),
    "serve": ("serve", "serve models over HTTP: OpenAI's interface, nanochat's, and a page to chat in"),
    "distill": ("distill", "have a teacher behind an OpenAI-compatible endpoint answer questions to train on"),
    "report": ("report", "write and print the report of a run, of artifacts, or of several runs"),
    "graph": ("graph", "draw the pipeline (--format ascii, mermaid, dot or json)"),
    "bench": ("bench", "measure how fast this machine works (bench train, bench core; --json for programs)"),
    "completion": ("completion", "print a script with which bash, zsh or fish completes all of this"),
    "doctor": ("doctor", "check device, BLAS, memory, versions and the outputs folder, and say how to mend it"),
}
