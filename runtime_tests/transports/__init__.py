"""Ways to a worker: a process here, an emulated machine, one behind ssh, Node, or a page."""
