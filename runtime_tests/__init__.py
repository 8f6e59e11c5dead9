"""Runs artifacts on real runtimes and compares them with the run directory."""
