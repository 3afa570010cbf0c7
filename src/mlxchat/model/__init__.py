"""The transformer, its sizes and its files."""
