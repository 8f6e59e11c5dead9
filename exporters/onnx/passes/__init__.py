"""What happens to a graph, one pass per module, each a function that edits an `onnx_ir` graph in place.

`graph_edit` and `weight_uses` are what passes share. Passes know nothing of the routes that use them.
"""
