"""Shared by all tests: determinism, one thread, the hypothesis profile, the table of tolerances."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "frobdecay",
    deadline=None,  # shared machines stall; a deadline would make the tests flaky
    derandomize=True,
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("frobdecay")

# Relative error allowed for sums of a few thousand products; by dtype of the factors.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, on one thread."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
