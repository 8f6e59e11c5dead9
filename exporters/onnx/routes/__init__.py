"""The ways to a graph: onnxruntime-genai's builder, torch.onnx.export, or the user's own.

Each ends in a `FinishedGraph`. Imports run one way: routes use `artifact` (reading and checking files) and `passes`,
`artifact` uses `passes`.
"""
