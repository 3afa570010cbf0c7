"""The verbs of the command line; config/verbs.py says where each is."""
