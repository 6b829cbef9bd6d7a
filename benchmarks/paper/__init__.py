"""The experiments of Engel et al. (ICLR 2024) as recipes: `python -m benchmarks.paper --help`."""
