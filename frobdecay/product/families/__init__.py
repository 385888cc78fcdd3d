"""What is known of the attention of transformers, by the full names of its types: two tables.

``known.csv`` has the layouts, each read off the type's own forward by a test. ``left.csv`` has the
types that are left alone, with the reason. A test shows that there is no third kind.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib.resources import files

_BETWEEN = {
    "rotary": "rotary embeddings between the factors turn queries and keys",
    "positions": "positions between the factors meet queries or keys alone",
    "cosine": "queries and keys are normalized between the factors",
    "biases": "biases of its own between the factors",
    "": "",
}
REASONS = {
    "latent": "latent attention: keys and values of all heads are packed behind a normalized "
    "latent, and meet queries in one part with and one without rotary embeddings",
    "shared": "layers share keys and values, or keys are the values, too",
    "gate": "queries share a weight with a gate",
    "linear": "linear or additive attention: no softmax of queries times keys",
    "deformable": "deformable attention: offsets say where it samples, and there are no keys",
    "convolution": "its projections have convolutions or batch normalizations in them",
    "reduction": "its keys and values are those of tokens that a layer of its own merges before",
    "sparse": "blocks, windows, hashing or sampling: not one softmax of all tokens, off which "
    "the products could be read",
    "other": "another function than one softmax of queries times keys",
    "several": "several projections make its queries, keys or scores",
    "experts": "its queries and outputs are made by experts",
    "open": "no output projection of its own: that of the module around it follows",
    "map": "a map of attention, without values",
    "pooling": "pooling: a parameter, not a token, asks",
    "none": "no attention but for its name",
    "unproved": "no test has read its products off its own forward yet; say where they are with "
    "frobdecay.register_products",
}


def _rows(table: str) -> Iterator[tuple[str, list[str]]]:
    lines = (files(__package__) / table).read_text("utf-8").splitlines()
    for name, *row in csv.reader(lines[1:]):
        yield f"transformers.models.{name}", row


TRANSFORMERS: dict[str, tuple[str, str, str]] = {
    name: (layout, _BETWEEN[scores], _BETWEEN[outputs])
    for name, (layout, scores, outputs) in _rows("known.csv")
}
"""Full name of a type -> its layout, and what is between the factors.

A test read the same products off its own forward. Of layouts, "|", the first that is there holds.
"""
LEFT: dict[str, str] = {name: REASONS[row[0]] for name, row in _rows("left.csv")}
"""Full name of a type -> why it is left alone."""
