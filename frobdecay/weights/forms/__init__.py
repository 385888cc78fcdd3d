"""Functions of torch that run on the factors of a weight, in a file for each kind.

linear        linear, matmul, embedding
convolution   convolutions and bilinear layers
attention     torch's multi-head attention
shapes        transposes, casts, splits: they stay factored
table         all of them; each enters itself
matrix        reading a weight as U M Vᵀ in any orientation
cost          factored or materialized: the one cost function
"""

from frobdecay.weights.forms import attention, convolution, linear, shapes
from frobdecay.weights.forms.table import FORMS

__all__ = ["FORMS", "attention", "convolution", "linear", "shapes"]
