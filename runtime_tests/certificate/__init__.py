"""The parity certificate: what `verify --report` writes (JSON and one page), and how it is re-checked."""
