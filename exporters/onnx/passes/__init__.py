"""What happens to the builder's graph, one pass per module, each a function that edits an `onnx_ir` graph in place."""
