"""The model families whose GGUF metadata is built in: one file a family, and beside them what all of them share.

A file with `ROWS` is a family's; `table` finds it.
"""
