"""The outputs folder: artifacts, records, names, locks, what goes in and out. It knows nothing of stages."""
