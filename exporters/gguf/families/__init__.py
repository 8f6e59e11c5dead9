"""The model families whose GGUF metadata is built in, one file a family."""
