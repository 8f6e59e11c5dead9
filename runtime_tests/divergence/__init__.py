"""Where a runtime leaves torch: the first decoder layer whose output is not torch's, found by comparing hidden states."""
