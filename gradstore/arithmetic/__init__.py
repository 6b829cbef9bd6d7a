"""Products of rows: a file for each arithmetic, its rounding and its error's bound; knows neither store nor kernel."""
