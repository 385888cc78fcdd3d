"""Calibration: what the layers of a model see, for the initialization of their factors."""
