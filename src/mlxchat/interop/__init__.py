"""Third-party models become checkpoints of ours, and ours become theirs; no code of a file runs."""
