"""Tensors in, tensors out: how factors multiply, and how a weight is decomposed into them."""
