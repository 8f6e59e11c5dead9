"""The file itself: head and tensor data, read, written and split. Nothing here knows a model."""
