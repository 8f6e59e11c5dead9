"""Tuning one decoder block: start, gradient steps, choice."""
