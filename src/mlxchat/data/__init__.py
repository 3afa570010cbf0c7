"""Corpora, tokenizers, conversations, and packing into training rows."""
