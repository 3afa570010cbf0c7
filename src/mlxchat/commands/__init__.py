"""The verbs of the command line, each in a module or two."""
