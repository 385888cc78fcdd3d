"""Other people's modules: their weights, choosing among them, replacing them.

layouts      which weights a module type has, and how each is read as a matrix
selection    the grammar of include= and exclude=
support      which weights can be factorized, and for the others, why not
candidates   a chosen weight with its parametrization
surgery      putting factors in a weight's place, all or none
unrolling    the chains of plain layers that stand for a factorized one
"""
