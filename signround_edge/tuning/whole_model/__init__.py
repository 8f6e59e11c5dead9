"""Tuning all blocks together on the KL divergence of the logits."""
