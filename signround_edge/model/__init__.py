"""A Hugging Face model folder: config, tokenizer, stored tensors, decoder blocks, experts."""
