"""Which pairs of a dataset contradict themselves, and where."""
