"""All that prints on a terminal: progress, and the tables of the commands. Only this and `cli` know click and rich."""
