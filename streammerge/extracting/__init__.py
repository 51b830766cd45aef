"""A low-rank adapter from the difference of two models."""
