"""The experts of transformers: every type that stacks them, on its factors."""

import copy
import functools
import inspect
import pathlib
import re
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import attention_probe as probe  # noqa: E402

from frobdecay import factorize, plan_ranks  # noqa: E402
from frobdecay.weights.layouts import layouts  # noqa: E402

TOKENS, EXPERTS, WIDTH, INNER = 6, 4, 48, 20
SIZES = [
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts n_shared_experts"),
    (WIDTH, "hidden_size moe_hidden_size input_size"),
    (INNER, "moe_intermediate_size intermediate_size expert_ffn_hidden_size ffn_hidden_size"),
    (INNER, "output_size"),
    ("silu", "hidden_act hidden_activation"),
]
OPTIONS = {
    **{name: size for size, names in SIZES for name in names.split()},
    **{"zero_expert_num": 0, "num_experts_per_tok": 2, "moe_latent_size": None},
}
BARE = {"DiffusionGemmaTextExperts", "InklingSharedExperts", "MuseSparkExperts"}
ALL = sorted(
    name
    for name, one in probe.classes().items()
    if re.search(r"Experts$|ExpertGLU$", name) and "Parameter(" in one.code
)
OTHERS = {  # stacks of matrices that are no experts: listed, and taken where they are named
    "convbert.GroupedLinearLayer",
    "csm.CsmCodebooksHead",
    "kyutai_speech_to_text.KyutaiSpeechToTextFlexibleLinear",
    "moshi.MoshiFlexibleLinear",
    "esmfold2.EsmFold2ConfidenceHead",
    "xlnet.XLNetRelativeAttention",
    "zamba.ZambaMambaMixer",
}
TABLES = {  # positions
    "dinat.NeighborhoodAttention",
    "gemma4.Gemma4VisionPatchEmbedder",
    "gemma4_unified.Gemma4UnifiedVisionEmbedder",
    "kimi_k25.Kimi_K25VisionPositionEmbeddings",
}


def short(name):
    """Model and type."""
    parts = name.split(".")
    return f"{parts[2]}.{parts[-1]}"


@functools.cache
def _made(name):
    """Experts with random numbers, in float32; of some, from no more of a configuration."""
    kind = probe.kind_of(name)
    if kind.__name__ not in BARE:
        return probe.build(name, **OPTIONS).float()
    config = SimpleNamespace(**OPTIONS, post_norm_eps=1e-6, _experts_implementation="eager")
    return probe._randomized(kind(config).eval())


def made(name):
    """A copy of them."""
    return copy.deepcopy(_made(name))


def called(module):
    """What the experts answer, each for some tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS * EXPERTS, WIDTH, generator=generator)
    chosen = torch.stack([torch.arange(len(x)), torch.arange(len(x)) + 1], -1) % EXPERTS
    shares = torch.rand(len(x), 2, generator=generator)
    names = [*inspect.signature(module.forward).parameters]
    if names == ["inputs", "expert_size"]:
        return module(x, [TOKENS] * EXPERTS)
    if names == ["hidden_states"]:
        return module(x)
    if names == ["hidden_states", "gammas"]:
        return module(x, torch.rand(len(x), EXPERTS, generator=generator))
    if len(names) == 4:  # slices of the experts' matrices are given
        return module(x, *(weight[:INNER] for weight in (module.w1, module.v1, module.w2)))
    return module(x, chosen, shares)


@pytest.mark.parametrize("name", ALL, ids=short)
def test_stacked_experts_answer_the_same_on_their_factors(name):
    """Every stack is known, read as one matrix an expert; at full rank nothing changes."""
    module = made(name)
    flat = ("w1", "v1", "w2")  # one below the other
    stacks = {n for n, parameter in module.named_parameters() if parameter.ndim > 2 or n in flat}
    assert {n for n in layouts(module) if hasattr(module, n)} == stacks
    with torch.no_grad():
        before = called(module)
        small = copy.deepcopy(module)
        plan = factorize(module, rank=1.0)
        taken = {row.name: row.matrix for row in plan.rows if row.rank is not None}
        assert set(taken) == stacks
        sides = {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}
        for key, (experts, rows, columns) in taken.items():
            assert experts == EXPERTS
            into, out = sides["down" if "down" in key or key == "w2" else "up"]
            assert (rows, columns) in ((out, into), (2 * out, into))
        torch.testing.assert_close(called(module), before, rtol=1e-4, atol=1e-4)
        factorize(small, rank=2)
        assert called(small).isfinite().all()


def test_every_stack_of_matrices_of_transformers_is_known_or_listed_here():
    """A parameter of three dimensions of another type is no expert's."""
    found = {
        short(name)
        for name, one in probe.classes().items()
        if name not in ALL and probe.stacks(one.code)
    }
    assert found == OTHERS | TABLES


def test_other_stacks_are_listed_in_the_plan():
    """With what to do about them."""
    kind = probe.kind_of("transformers.models.moshi.modeling_moshi.MoshiFlexibleLinear")
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(9, 9), "several": kind(8, 6, 3)})
    (row,) = (row for row in plan_ranks(model, rank=2).rows if row.name == "several.weight")
    assert row.rank is None
    assert "MoshiFlexibleLinear" in row.reason
    assert "name it, with a pattern" in row.reason


def test_the_table_in_the_docs_is_what_is_tested():
    """The types of each layout, by name where they are few."""
    found = {}
    for name in ALL:
        module = made(name)
        read = {n: one for n, one in layouts(module).items() if hasattr(module, n)}
        key = " ".join(f"{n}: {one.pattern};" for n, one in read.items())
        found.setdefault(key.rstrip(";"), []).append(name.rpartition(".")[2])
    rows = [
        f"| `{key}` | {f'{len(all_of)} types' if len(all_of) > 9 else ', '.join(sorted(all_of))} |"
        for key, all_of in found.items()
    ]
    page = (pathlib.Path(__file__).parents[2] / "docs" / "pretrained.md").read_text("utf-8")
    assert f"{len(ALL)} types of experts" in page
    assert set(re.findall(r"^\| `[^`]+ -> .*$", page, re.MULTILINE)) == set(rows)
