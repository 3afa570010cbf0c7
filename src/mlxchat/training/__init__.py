"""The training loop, its step, its horizon, and the state it resumes from."""
