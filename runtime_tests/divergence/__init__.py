"""Where a runtime leaves torch: the first layer whose output is not torch's, found by comparing hidden states."""
