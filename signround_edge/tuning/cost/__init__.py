"""What a run costs: counted before it starts, measured when it is done."""
