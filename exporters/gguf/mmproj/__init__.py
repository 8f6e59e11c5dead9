"""llama.cpp's mmproj files: what turns images into embeddings for a language model, which is a file of its own."""
