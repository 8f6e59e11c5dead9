"""Side-by-side measurements: quality, bytes, wall time and peak memory of our files and of peers'."""
