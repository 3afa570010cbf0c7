"""Muon and AdamW, their parameter groups, and the schedules of their rates."""
