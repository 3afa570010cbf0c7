"""Sandbox for programs written by models, for evaluations."""
