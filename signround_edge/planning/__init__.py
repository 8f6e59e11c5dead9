"""`plan`: types for every tensor under a budget of bytes."""
