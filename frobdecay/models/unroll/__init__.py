"""Factorized layers as chains of plain ones."""
