"""Factors to and from files, and dense weights into factorized models."""
