"""The stages: one file each, the recipe and not the machinery.

A stage file declares, as literals that planning reads without importing it: VERSION (raised when a change of the code
changes results), CONFIG (the sections of the configuration that it reads), INPUTS and OPTIONAL_INPUTS (role → kind of
artifact), PRODUCES (kind), OUTPUTS (files that must exist afterwards, "a|b": one of both) and, if its artifacts are
named after a value of the configuration, LABEL. RESOURCES = ["gpu"]: it computes on the GPU, which one step has at a
time. READS_IF: sections and settings that only some steps read, each with the condition: a role that is filled, or the
format (base or chat) of the checkpoint; the others' keys leave them out. FORMAT: of the checkpoint that the stage
makes. FORECAST: a module that describes a step before it runs (`runner/stage.py`). METRICS: the numbers
that it records in ctx.metrics, each with the better direction (minimize, maximize or neither), "while training" if
metrics.jsonl has it at iterations too, and, after "if", the conditions under which it is recorded (`sweep/results.py`).
Its `run(ctx)` does the work.
"""
