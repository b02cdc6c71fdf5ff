"""Task 1: a pretrained encoder becomes a tokenizer."""
