"""The `bench` verb, and the same model in PyTorch to measure against."""
