"""The ways to a graph: onnxruntime-genai's builder, torch.onnx.export, or the user's own."""
