"""The plan of a run and the memory and time that it needs, computed without running it."""
