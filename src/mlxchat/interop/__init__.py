"""Models of other makes become checkpoints of ours, and ours become theirs; nobody's code ever runs."""
