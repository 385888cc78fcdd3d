"""timm needs torchvision, whose wheel for GPUs needs two operators to be declared on a CPU."""

from importlib.util import find_spec

import pytest
import torch

WARNINGS = (r"`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",)

if find_spec("torchvision") is not None and not torch.cuda.is_available():
    # Kept alive: the declarations go with the object.
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure(config: pytest.Config) -> None:
    """Silence what the packages themselves warn of."""
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{line}")
