"""The gradient of the penalty, of all products at once: where it is computed, and by what."""
