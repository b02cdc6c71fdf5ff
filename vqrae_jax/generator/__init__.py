"""Task 2: a language model that learns the codes of images."""
