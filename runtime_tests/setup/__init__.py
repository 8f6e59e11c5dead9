"""What devices need on this machine, and how to get it from package registries: `signround-edge devices --setup`."""
