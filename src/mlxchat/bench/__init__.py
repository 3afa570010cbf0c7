"""Benchmarks on this machine (`mlxchat bench KIND`), one module per kind."""
