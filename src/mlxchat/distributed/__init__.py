"""Runs of several processes: rank 0 leads, and all ranks execute the functions that it calls."""
