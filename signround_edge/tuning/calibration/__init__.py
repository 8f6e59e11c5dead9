"""The calibration text, the activations that it causes, and what is measured of them."""
