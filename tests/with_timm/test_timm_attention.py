"""The attention of timm's vision transformers: packed, with and without normalizations."""

import copy

import pytest

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

import torch  # noqa: E402

from frobdecay import FrobeniusDecay, balance_, products  # noqa: E402
from frobdecay.product.product import product_norm  # noqa: E402

KINDS = {
    "plain": {},
    "without biases": {"qkv_bias": False},
    "normalized queries": {"qk_norm": True},
    "normalized outputs": {"scale_attn_norm": True},
}
FIXED = {"normalized queries": "query_key", "normalized outputs": "output_value"}

pytestmark = pytest.mark.integration(row="timm ViT")


def made(kind):
    """Two blocks of three heads, with random biases, in float64."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3,
        num_classes=5, **KINDS[kind],
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def per_head(attention):
    """Σ over the heads of ‖W_qᵀ W_k‖² and of ‖W_o W_v‖² by a plain loop."""
    size = attention.head_dim
    q, k, v = attention.qkv.weight.chunk(3)
    o = attention.proj.weight
    parts = [slice(i * size, (i + 1) * size) for i in range(attention.num_heads)]
    scores = sum((q[part].T @ k[part]).square().sum() for part in parts)
    return scores, sum((o[:, part] @ v[part]).square().sum() for part in parts)


@pytest.mark.covers("C6")
@pytest.mark.integration(column="attention products")
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_loops_over_heads(kind):
    """Both norms of every block."""
    model, _ = made(kind)
    names = [f"blocks.{b}.attn.{name}" for b in (0, 1) for name in ("query_key", "output_value")]
    squares = [square.item() for block in model.blocks for square in per_head(block.attn)]
    found = products(model)
    assert [product.name for product in found] == names
    norms = [product_norm(product).item() ** 2 for product in found]
    assert norms == pytest.approx(squares)


@pytest.mark.integration(column="attention decay")
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_decays_the_loops_over_heads(kind):
    """AdamW with its own weight decay: of the four weights it becomes the loops' gradient."""
    ours, x = made(kind)
    theirs = copy.deepcopy(ours)
    lr, decay = 0.01, 0.1
    base = torch.optim.AdamW(ours.parameters(), lr=lr, weight_decay=decay)
    optimizer = FrobeniusDecay(base, ours)
    ours(x).square().mean().backward()
    optimizer.step()

    squares = [square for block in theirs.blocks for square in per_head(block.attn)]
    (sum(squares) / 2).backward()
    slopes = {p: p.grad.clone() for p in theirs.parameters() if p.grad is not None}
    theirs.zero_grad()
    theirs(x).square().mean().backward()
    others = [p for p in theirs.parameters() if p not in slopes]
    groups = [{"params": [*slopes], "weight_decay": 0.0}, {"params": others}]
    torch.optim.AdamW(groups, lr=lr, weight_decay=decay).step()
    with torch.no_grad():
        for parameter, slope in slopes.items():
            parameter -= lr * decay * slope
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.integration(column="attention balance")
@pytest.mark.parametrize("kind", KINDS)
def test_balancing_changes_no_output(kind):
    """Of all products without a normalization between the factors; the others are refused."""
    model, x = made(kind)
    before = model(x)
    if kind in FIXED:
        with pytest.raises(ValueError, match=rf"blocks.0.attn.{FIXED[kind]}: .*norm.*exclude="):
            balance_(products(model))
        assert torch.equal(model(x), before)
    weights = model.blocks[0].attn.qkv.weight.detach().clone()
    balance_(products(model, exclude=f"*.{FIXED[kind]}" if kind in FIXED else None))
    assert (model(x) - before).abs().max() <= 1e-10 * before.abs().max()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, weights)
