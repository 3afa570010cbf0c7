"""Runs programs that a model wrote, for evaluations and for the Python tool, confined by the operating system."""
