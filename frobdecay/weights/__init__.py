"""What a factorized weight is: its parametrization, and the tensor that stands for the product."""
