"""Import of third-party models and export of checkpoints; no code of imported files is executed."""
