"""Functions of torch that run on the factors of a weight; ``table.py`` has them all."""
