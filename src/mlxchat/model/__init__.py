"""The transformer, its sizes, adapters and files."""
