"""The verbs, one module each; `main(arguments)` returns the exit code."""
