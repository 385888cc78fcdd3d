"""Calibrated initialization of timm's models: every layer's outputs are nearer."""

import copy
import functools

import pytest
import torch

from frobdecay import LowRank, calibrate, factorize

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

MODELS = {
    "timm ResNet": ("resnet10t", {}),
    "timm ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "timm ViT": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    ),
}


@pytest.mark.integration(column="calibrate")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.integration(row=name)) for name in MODELS]
)
def test_every_layers_outputs_are_nearer_than_the_plain_ones(family):
    """On the calibration data, each layer on the dense model's inputs, read by channels."""
    torch.manual_seed(0)
    name, options = MODELS[family]
    model = timm.create_model(name, num_classes=5, **options).eval()
    x = torch.randn(6, 3, 32, 32).cumsum(-1) / 4
    stats = calibrate(model, [(x[:3], None), (x[3:], None)])
    calls = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, out, path=path: calls.update({path: (args, out)})
        )
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        model(x)
    channel = functools.partial(LowRank, pattern="channel")
    factorize(plain, rank=3, parametrization=channel)
    plan = factorize(ours, rank=3, parametrization=channel, init=stats)
    taken = [row for row in plan.rows if row.rank is not None]
    assert len(taken) > 8
    for row in taken:
        assert row.reason is None, row
        path = row.name.removesuffix(".weight")
        args, out = calls[path]
        with torch.no_grad():
            here, there = ((m.get_submodule(path)(*args) - out).norm() for m in (ours, plain))
        assert here <= there * (1 + 1e-4) + 1e-6, path
