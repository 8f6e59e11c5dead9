"""How much each weight of a model matters to its output, measured in one pass, and what a type would cost there."""
