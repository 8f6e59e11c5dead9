"""Ways to reach a worker: a process here, an emulated or a distant one, a browser."""
