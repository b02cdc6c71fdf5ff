"""Weights from and to the files of other code bases: the only place that knows foreign key names."""
