"""Several processes as one: a group of ranks, of which the first leads and the others compute what it asks for."""
