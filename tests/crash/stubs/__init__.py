"""Miniature stages of every kind, without MLX: what the crash tests run hundreds of times."""
