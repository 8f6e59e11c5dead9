"""What `verify` found, as data: figures, verdicts, and hashes of what they rest on."""
