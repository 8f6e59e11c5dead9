"""llama.cpp's importance matrices, read and written."""
