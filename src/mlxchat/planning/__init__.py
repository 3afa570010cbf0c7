"""Predictions before a run starts: horizon, text, memory, time. Only `peak` imports MLX."""
