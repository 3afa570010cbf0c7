"""Muon and AdamW, the parameters each of them moves, and the schedules of their rates."""
