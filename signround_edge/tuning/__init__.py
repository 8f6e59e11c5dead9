"""SignRound: calibration, the block loop, the fused sign step and resume."""
