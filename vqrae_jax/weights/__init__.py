"""Other people's files, both ways: the only place that knows foreign names."""
