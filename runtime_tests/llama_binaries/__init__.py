"""`verify --llama-bin`: official llama.cpp binaries compute the figures, so that nothing of ours runs on the device."""
