"""Predictions before a run starts: horizon, inputs, memory, time."""
