"""Third-party packages: their warnings, each by its message, and no network."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

collect_ignore = [
    "attention_probe.py",
    "bases.py",
    "zoo.py",
]  # no tests; they import what may not be there

WARNINGS: tuple[str, ...] = (
    r"Trying to compute SVD with n_eigenvecs=:UserWarning:tensorly",
    r"`is_gradient_checkpointing` is deprecated:FutureWarning",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Silence what the packages themselves warn of."""
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{line}")
