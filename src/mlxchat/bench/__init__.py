"""Measurements of this machine at work: what `mlxchat bench KIND` prints, one module for each kind."""
