"""How each ggml type lays out codes and scale fields in bytes, and the packing of whole tensors."""
