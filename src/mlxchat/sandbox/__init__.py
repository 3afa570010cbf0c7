"""Programs that a model wrote are executed here, by evaluations and by the tool of answers, and harm nothing."""
