"""The training loop, its step, and the state it resumes from."""
