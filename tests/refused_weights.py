"""Weights that cannot be factorized, and a part of the reason that is given."""

import warnings

import torch
from torch import nn
from torch.nn.utils import prune


class Net(nn.Module):
    """Where every wrong thing is put: ``bad`` beside two layers with nothing wrong."""

    def __init__(self, bad=None):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.bad = bad if bad is not None else nn.Linear(6, 6)
        self.last = nn.Conv2d(6, 4, 3)


def _with_weight(weight, requires_grad=True):
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(weight, requires_grad)
    return layer


def _tied():
    net = Net()
    net.bad.weight = nn.Parameter(torch.randn(6, 8))
    net.first.weight = net.bad.weight
    return net


def _hooked(name):
    net = Net()
    getattr(net.bad.weight, name)(lambda _: None)
    return net


def _pruned():
    layer = nn.Linear(6, 6)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def _buffer():
    layer = nn.Linear(6, 6)
    del layer.weight
    layer.register_buffer("weight", torch.randn(6, 6))
    return layer


def _old_norm(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(nn.Linear(6, 6))


def _quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.dynamic.Linear(6, 6)


def _qint():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.eye(6), 0.1, 0, torch.qint8)


class Subclass(torch.Tensor):
    """A weight format of somebody else."""


NAN, INF = torch.full((6, 6), float("nan")), torch.ones(6, 6) / 0


# What is wrong -> (the model, a part of the reason). ``bad`` is named: an error. Swept in by
# default, it is listed in the plan, and the others are factorized; unless the error is for all.
REFUSED = {
    "tied": (_tied, "tied to first.weight"),
    "max_norm": (lambda: Net(nn.Embedding(9, 6, max_norm=1.0)), "max_norm"),
    "sparse gradients": (lambda: Net(nn.Embedding(9, 6, sparse=True)), "sparse=True"),
    "bag with sparse gradients": (lambda: Net(nn.EmbeddingBag(9, 6, sparse=True)), "sparse=True"),
    "scale_grad_by_freq": (
        lambda: Net(nn.Embedding(9, 6, scale_grad_by_freq=True)), "scale_grad_by_freq"),
    "old weight_norm": (lambda: Net(_old_norm(nn.utils.weight_norm)), "WeightNorm"),
    "old spectral_norm": (lambda: Net(_old_norm(nn.utils.spectral_norm)), "SpectralNorm"),
    "spectral_norm": (
        lambda: Net(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))),
        "already parametrized by _SpectralNorm"),
    "pruned": (lambda: Net(_pruned()), "RandomUnstructured"),
    "buffer": (lambda: Net(_buffer()), "a buffer"),
    "quantized": (lambda: Net(_quantized()), "quantized"),
    "quantized tensor": (
        lambda: Net(_with_weight(_qint(), False)), "torch.qint8, torch.strided"),
    "integer": (lambda: Net(_with_weight(torch.ones(6, 6, dtype=torch.int8), False)), "torch.int8"),
    "float8": (
        lambda: Net(_with_weight(torch.ones(6, 6).to(torch.float8_e4m3fn), False)),
        "torch.float8_e4m3fn; convert it"),
    "float8 of 5 bits": (
        lambda: Net(_with_weight(torch.ones(6, 6).to(torch.float8_e5m2), False)), "torch.float8"),
    "scales": (
        lambda: Net(_with_weight(torch.ones(6, 6).to(torch.float8_e8m0fnu), False)), "e8m0fnu"),
    "float4": (
        lambda: Net(_with_weight(
            torch.zeros(6, 6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), False)), "float4"),
    "bool": (lambda: Net(_with_weight(torch.ones(6, 6).bool(), False)), "torch.bool"),
    "complex": (lambda: Net(_with_weight(torch.ones(6, 6) + 0j)), "torch.complex64"),
    "sparse": (lambda: Net(_with_weight(torch.eye(6).to_sparse())), "torch.sparse_coo"),
    "subclass": (lambda: Net(_with_weight(torch.ones(6, 6).as_subclass(Subclass))), "Subclass"),
    "empty": (lambda: Net(_with_weight(torch.empty(0, 6))), "empty"),
    "zero": (lambda: Net(_with_weight(torch.zeros(6, 6))), "zero"),
    "gradient hook": (lambda: _hooked("register_hook"), "gradient hooks"),
    "accumulation hook": (
        lambda: _hooked("register_post_accumulate_grad_hook"), "gradient hooks"),
}  # fmt: skip


# Wrong whatever was selected.
FATAL = {
    "NaN": (lambda: Net(_with_weight(NAN)), "bad.weight holds NaN"),
    "infinity": (lambda: Net(_with_weight(INF)), "bad.weight holds NaN or infinity"),
    "lazy": (lambda: Net(nn.LazyLinear(6)), "bad.weight has no shape yet.*run the model once"),
    "meta": (lambda: Net(nn.Linear(6, 6, device="meta")), "bad.weight is on the meta device"),
}
