"""Spectral initialization in the metric of the data: moments, and truncation by them."""
