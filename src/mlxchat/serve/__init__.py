"""A model over HTTP: OpenAI's interface, nanochat's own, and a page to chat in."""
