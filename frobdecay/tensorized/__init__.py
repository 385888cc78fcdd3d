"""Parametrizations by tensor decompositions.

base    what they have in common: reading, initialization, forward, the product's record
kinds   Tucker, TensorTrain, CP: ranks, shapes, and how the factors combine
"""
