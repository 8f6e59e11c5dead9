"""The ways to a file's metadata other than the built-in families."""
