"""What devices need on this machine, how to get it from package registries, and the cache where it is kept."""
