"""Checkpoints of any size with drawn or sparse weights, for tests and measurements."""
