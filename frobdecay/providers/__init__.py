"""Where other people's modules hold products; each file has a table of providers.

A provider is a function (module, name) -> products. Types of third parties are known by their
qualified names and never imported. Users add theirs with ``frobdecay.register_products``.
"""
