"""factorize, calibrate, merge and unroll on image models of timm."""

import copy
import functools

import pytest
import torch

from frobdecay import LowRank, calibrate, factorize, merge, unroll

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

MODELS = {
    "timm ResNet": ("resnet10t", {}),
    "timm ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "timm ViT": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    ),
    "timm MobileNet": ("mobilenetv3_small_050", {}),
}
DEPTHWISE = ("timm ConvNeXt", "timm MobileNet")


def column(name, **options):
    """The column of the integration matrix that a test fills."""
    return pytest.mark.integration(column=name, **options)


def families(*names):
    """Parameters: families, each a row of the matrix."""
    return [pytest.param(n, marks=pytest.mark.integration(row=n)) for n in names or MODELS]


def made(family, dtype=torch.float64):
    """A model in evaluation mode and images."""
    name, options = MODELS[family]
    model = timm.create_model(name, num_classes=5, **options)
    return model.eval().to(dtype), torch.randn(2, 3, 32, 32).to(dtype)


@pytest.mark.covers("P7")
@column("factorize")
@pytest.mark.parametrize("family", families())
def test_full_rank_is_the_dense_model(family):
    """The same outputs, and every factor gets a gradient."""
    model, x = made(family)
    expected = model(x)
    factorize(model, rank=1.0)
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-9)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@column("factorize")
@pytest.mark.parametrize("family", families())
def test_dense_is_left_what_the_plan_lists(family):
    """Depthwise convolutions, with that reason; named, they are factorized too."""
    model, x = made(family)
    plan = factorize(model, ratio=0.5)
    depthwise = [row.name for row in plan.rows if "depthwise" in (row.reason or "")]
    assert bool(depthwise) == (family in DEPTHWISE)
    grouped = {f"{n}.weight" for n, m in model.named_modules() if getattr(m, "groups", 1) > 1}
    assert set(depthwise) == grouped
    assert plan.after == sum(p.numel() for p in model.parameters())
    for name in depthwise[:1]:
        factorize(model, rank=1, include=name)
        assert model(x).shape == (2, 5)


@column("merge, save_pretrained")
@pytest.mark.parametrize("family", families())
def test_merged_models_are_dense_again(family):
    """The same keys, classes and outputs."""
    model, x = made(family)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    factorize(model, rank=0.3)
    expected = model(x)
    merge(model)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, kinds)
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-9)


@column("unroll")
@pytest.mark.parametrize("family", families("timm ResNet", "timm ConvNeXt", "timm ViT"))
def test_unrolled_models_are_plain_torch(family):
    """Chains of convolutions and linear layers with the same outputs."""
    model, x = made(family)
    factorize(model, rank=0.3)
    expected = model(x)
    unrolled = unroll(model)
    torch.testing.assert_close(unrolled(x), expected, rtol=1e-8, atol=1e-9)
    assert not any("parametrizations" in name for name, _ in unrolled.named_modules())


@pytest.mark.integration(row="timm MobileNet", column="unroll", refused=True)
def test_layers_with_a_forward_of_their_own_are_not_unrolled():
    """The classifier is timm's own Linear; merged, the rest is unrolled."""
    model, x = made("timm MobileNet")
    factorize(model, rank=0.3)
    expected = model(x)
    with pytest.raises(ValueError, match=r"classifier\.weight: a timm\..*Linear reads its weight"):
        unroll(model)
    merge(model, include="classifier")
    torch.testing.assert_close(unroll(model)(x), expected, rtol=1e-8, atol=1e-9)


@column("gradient checkpointing")
@pytest.mark.parametrize("family", families())
def test_gradient_checkpointing_gives_the_same_gradients(family):
    """The factors' gradients, recomputed."""
    model, x = made(family)
    factorize(model, rank=0.3)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x.requires_grad_()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-10)


@column("dtype, deepcopy")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", families())
def test_conversions_and_copies(family, dtype):
    """Factors of that dtype, and a copy that is independent."""
    model, x = made(family)
    factorize(model, rank=0.3)
    model.to(dtype)
    twin = merge(copy.deepcopy(model))
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = model(x.to(dtype))
    assert out.dtype == dtype
    assert not any("parametrizations" in name for name, _ in twin.named_modules())
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(twin(x.to(dtype)), out, **close)


@column("torch.compile")
@pytest.mark.parametrize("family", families("timm ConvNeXt", "timm ViT"))
def test_compiled_models_are_one_graph_with_the_same_gradients(family):
    """Factors are inputs of the graph; nothing breaks it."""
    model, x = made(family)
    factorize(model, rank=0.3)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-10)


@column("torch.export")
@pytest.mark.parametrize("family", families("timm ResNet"))
def test_exported_models_compute_the_same(family):
    """The factorized model itself, without unrolling."""
    model, x = made(family)
    factorize(model, rank=0.3)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@column("ONNX export")
@pytest.mark.parametrize("family", families("timm ConvNeXt", "timm ViT"))
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
def test_unrolled_models_are_exported_to_onnx(family, tmp_path):
    """The reference runtime computes the same from the file."""
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, x = made(family, torch.float32)
    factorize(model, rank=0.3)
    model, file = unroll(model).eval(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(str(file))
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-4)


@column("calibrate")
@pytest.mark.parametrize("family", families("timm ResNet", "timm ConvNeXt", "timm ViT"))
def test_every_layers_outputs_are_nearer_than_the_plain_ones(family):
    """On the calibration data, each layer on the dense model's inputs, read by channels."""
    torch.manual_seed(0)
    model, _ = made(family, torch.float32)
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
