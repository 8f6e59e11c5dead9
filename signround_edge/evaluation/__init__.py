"""Perplexity, KL divergence and task scores."""
