"""What `verify` compares: stored weights, logits, hidden states; and the gates that decide."""
