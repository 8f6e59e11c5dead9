"""signround-edge: SignRound-tuned 2- to 8-bit weights, exact on the grids of GGUF and ONNX Runtime."""

__version__ = "0.1.0"
