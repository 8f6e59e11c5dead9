"""Faster forms of a block's own modules for tuning on CPUs."""
