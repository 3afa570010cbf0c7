"""A model over HTTP: OpenAI's interface, and a page to chat in."""
