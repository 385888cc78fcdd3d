"""Norms, bounds and effective step sizes of products, measured once or over a training run."""

from frobdecay.diagnostics.comparison import Comparison, LayerComparison, compare
from frobdecay.diagnostics.measurement import QUANTITIES, Measurement, ProductMeasurement, measure
from frobdecay.diagnostics.recorder import Recorder

__all__ = [
    "QUANTITIES",
    "Comparison",
    "LayerComparison",
    "Measurement",
    "ProductMeasurement",
    "Recorder",
    "compare",
    "measure",
]
