"""Scripts that measure what the README claims; each runs with ``python -m benchmarks.NAME``."""
