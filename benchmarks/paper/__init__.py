"""The tables of SignRound's paper (arXiv 2309.05516) on small models: `python -m benchmarks.paper --help`."""
