"""Ways to reach a worker process: on this machine for now."""
