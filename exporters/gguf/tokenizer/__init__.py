"""The tokenizer's metadata."""
