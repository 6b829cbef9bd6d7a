"""Products of queries and rows, with a bound on how far each is off."""
