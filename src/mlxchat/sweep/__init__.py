"""Many runs from one command: `-m` lists them beforehand, `sweep=tpe` chooses each by the results of those before."""
