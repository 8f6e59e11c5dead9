"""Every family of models from its checkpoint to a file that runs: `python -m benchmarks.models`, docs/models.md."""
