"""The parity certificate: the report and its evidence as JSON and one page (`verify --report`), and its re-check."""
