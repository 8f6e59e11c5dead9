"""What `verify` found: figures, verdicts and evidence as data."""
