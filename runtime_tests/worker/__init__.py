"""All that runs on a device, and nothing else: this folder, the errors and the metrics are the whole bundle."""
