"""The stages: one file each, the recipe and not the machinery.

A file declares `stage = Stage(...)` (`runner/stage.py`) and defines `run(ctx)`, which does the work. Planning imports
the files; what only `run` needs is imported inside it.
"""
