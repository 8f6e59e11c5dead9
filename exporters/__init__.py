"""Exporters: run directory to GGUF or ONNX. They pack bits and never round a weight."""
