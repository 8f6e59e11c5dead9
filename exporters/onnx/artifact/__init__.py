"""The exported folder: written, described, read back and checked."""
