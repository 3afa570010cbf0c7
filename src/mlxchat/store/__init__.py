"""The outputs folder: artifacts, records, names, locks, import and export. Independent of stages."""
