"""What the kind of projection does to similarities and explanations: `python -m benchmarks.bench_kinds --help`."""
