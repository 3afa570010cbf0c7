"""From conf/ and a command line to a typed, checked configuration."""
