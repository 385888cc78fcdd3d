"""A product: the factors of a weight, wherever they live, and how they are found in a model."""
