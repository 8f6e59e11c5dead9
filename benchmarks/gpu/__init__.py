"""One command for a GPU: ceilings, checks against the CPU, where a step's time goes, memory; see README.md there."""
