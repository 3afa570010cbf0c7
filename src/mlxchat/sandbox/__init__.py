"""Sandbox for programs written by models, for evaluations and the Python tool."""
