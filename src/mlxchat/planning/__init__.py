"""What is known of a run before it starts: horizon, text, memory, time. Only `peak` imports MLX."""
