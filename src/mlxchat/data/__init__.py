"""Text, tokens, conversations, and the rows that training reads."""
