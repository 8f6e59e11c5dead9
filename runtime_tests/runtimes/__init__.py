"""What computes: a module for each runtime says how it opens an artifact in a worker and reads its stored weights."""
