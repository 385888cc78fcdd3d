"""Factorized training that works as well as dense training."""

__version__ = "0.1.0"
