"""How a run gets its ranks, watches them, and ends with them. What they compute together is in `distributed`."""
