"""Preference training on pairs of a chosen and a rejected answer. Read samples, loss, batches in this order."""
