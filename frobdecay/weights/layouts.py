"""Which weights a module type has, and how each is read as a matrix: one table.

    Linear, Embedding, recurrent      "o i -> o i"                            one matrix
    Conv2d                            "o i kh kw -> (o kh) (i kw)"            spatial (the paper's)
    Conv2d, pattern="channel"         "o i kh kw -> o (i kh kw)"
    Conv2d, groups=g                  "(g o) i kh kw -> g (o kh) (i kw)"      one matrix a group
    ConvTranspose2d                   "i o kh kw -> (o kh) (i kw)"
    Bilinear                          "o i j -> o (i j)"
    MultiheadAttention.in_proj_weight "(b o) i -> b o i" with b = 3           queries, keys, values
    transformers' Conv1D              "i o -> o i"                            stored transposed
    transformers' expert stacks       "e o i -> e o i"                        one matrix an expert

Convolutions of one and three dimensions likewise. Where a reading leaves nothing to save even at
rank 1, as that of a k×1 kernel on one channel, which is all rows, or of a 1×k kernel to one, all
columns, another split of the axes is taken (``Layout.reading``).

A recurrent layer's stacked gates stay one matrix: every gate has its own rows of U, and V, what
they read, is shared, as is usual for low-rank recurrent layers (Kuchaiev & Ginsburg 2017,
arXiv:1703.10722). So do the gate and the up projection that experts hold in one stack. Types of
other packages are known by name: the package is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from frobdecay.algebra.reading import Matricization

NAMED_PATTERNS = ("spatial", "channel")

_KERNEL = {1: ("k",), 2: ("kh", "kw"), 3: ("kd", "kh", "kw")}


@dataclass(frozen=True)
class Layout:
    """How one weight is read as a matrix (or as a batch of matrices).

    Attributes:
        pattern: the default einops pattern.
        axes: lengths that the pattern needs.
        channel: the channel matricization of a convolution.
        others: patterns to take instead, in order, where the default one cannot pay.
        depthwise: whether every matrix of the weight has a single channel on one side.
    """

    pattern: str
    axes: Mapping[str, int] = field(default_factory=dict)
    channel: str | None = None
    others: tuple[str, ...] = ()
    depthwise: bool = False

    def reading(self, name: str | None, shape: Sequence[int]) -> str:
        """The pattern for a weight of this shape.

        Args:
            name: "spatial" or "channel"; None for the first with r (m + n) < m n at rank r = 1.
            shape: of the weight.

        Raises:
            ValueError: the shape does not fit.
        """
        if name is not None or not self.others:
            return self.channel or self.pattern if name == "channel" else self.pattern
        for pattern in (self.pattern, *self.others):
            view = Matricization.of(pattern, tuple(shape), self.axes)
            if view.rows + view.columns < view.rows * view.columns:
                return pattern
        return self.pattern


def _convolution(kernel: tuple[str, ...], groups: int, transposed: bool) -> Layout:
    """Rows are the output channels and the kernel's first axis, columns are the rest."""
    batch, axes = ("g ", {"g": groups}) if groups > 1 else ("", {})
    first, second = ("i", "o") if transposed else ("o", "i")
    tensor = f"{f'({batch}{first})' if groups > 1 else first} {second} {' '.join(kernel)}"

    def split(k: int) -> str:
        """The first k axes of the kernel to the rows."""
        sides = (_item("o", *kernel[:k]), _item("i", *kernel[k:]))
        return f"{tensor} -> {batch}{' '.join(sides)}"

    # The default first: one axis to the rows, unless it is the only one.
    default = 1 if len(kernel) > 1 else 0
    patterns = [split(k) for k in sorted(range(len(kernel) + 1), key=lambda k: k != default)]
    return Layout(patterns[0], MappingProxyType(axes), split(0), tuple(patterns[1:]))


def _item(*axes: str) -> str:
    """Axes that are one dimension of a matrix."""
    return f"({' '.join(axes)})" if len(axes) > 1 else axes[0]


def _conv_layouts(module: nn.Module) -> dict[str, Layout]:
    assert isinstance(module, _ConvNd)
    transposed = isinstance(module, _ConvTransposeNd)
    layout = _convolution(_KERNEL[len(module.kernel_size)], module.groups, transposed)
    depthwise = module.groups > 1 and module.groups in (module.in_channels, module.out_channels)
    return {"weight": replace(layout, depthwise=depthwise)}


def _recurrent_layouts(module: nn.Module) -> dict[str, Layout]:
    names: list[str] = getattr(module, "_flat_weights_names", ["weight_ih", "weight_hh"])
    return {name: Layout("o i -> o i") for name in names if name.startswith("weight_")}


def _expert_layouts(module: nn.Module) -> dict[str, Layout]:
    """Three dimensions; most types say in which order, for the kernels that run them.

    Where one does not, its experts are applied as linear layers are, but for those of Llama 4.
    """
    transposed = getattr(module, "is_transposed", is_kind(module, "*.Llama4TextExperts"))
    layout = Layout("e i o -> e o i" if transposed else "e o i -> e o i")
    stacks = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "weight")
    return {name: layout for name in stacks if getattr(getattr(module, name, None), "ndim", 0) == 3}


def _flat_expert_layouts(module: nn.Module) -> dict[str, Layout]:
    """DBRX: the experts one below the other; w2 is stored inputs×outputs."""
    axes = MappingProxyType({"e": int(module.moe_num_experts)})  # type: ignore[arg-type]
    into, out = Layout("(e o) i -> e o i", axes), Layout("(e i) o -> e o i", axes)
    return {"w1": into, "v1": into, "w2": out}


Kind = type[nn.Module] | str
Layouts = Mapping[str, Layout]

_MATRIX = {"weight": Layout("o i -> o i")}
_ATTENTION = {  # out_proj is a module of its own, found as a Linear
    "in_proj_weight": Layout("(b o) i -> b o i", MappingProxyType({"b": 3})),
    **{f"{part}_proj_weight": Layout("o i -> o i") for part in "qkv"},
}

_TABLE: tuple[tuple[Kind, Layouts | Callable[[nn.Module], Layouts]], ...] = (
    (nn.Linear, _MATRIX),
    (nn.Embedding, _MATRIX),
    (nn.EmbeddingBag, _MATRIX),
    (_ConvNd, _conv_layouts),
    (nn.Bilinear, {"weight": Layout("o i j -> o (i j)", others=("o i j -> (o i) j",))}),
    (nn.MultiheadAttention, _ATTENTION),
    (nn.RNNBase, _recurrent_layouts),
    (nn.RNNCellBase, _recurrent_layouts),
    ("transformers.pytorch_utils.Conv1D", {"weight": Layout("i o -> o i")}),
    ("transformers.models.dbrx.*ExpertGLU", _flat_expert_layouts),
    ("transformers.models.*Experts", _expert_layouts),
)


def is_kind(module: nn.Module, kind: Kind) -> bool:
    """Whether a module is of a type, or of one whose full name fits a glob."""
    if isinstance(kind, type):
        return isinstance(module, kind)
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return any(fnmatchcase(name, kind) for name in names)


def layouts(module: nn.Module) -> Layouts:
    """List the weights of a module that are factorized by default.

    Returns:
        Attribute name -> layout, in the order of the table; empty for an unknown module type. Not
        every name has to exist in this instance (``q_proj_weight`` of a packed attention).
    """
    for kind, rows in _TABLE:
        if is_kind(module, kind):
            return rows(module) if callable(rows) else rows
    return {}


def default_layout(dims: int) -> Layout | None:
    """The layout of a tensor of which only the number of dimensions is known, 2 to 5."""
    if dims == 2:
        return Layout("o i -> o i")
    return _convolution(_KERNEL[dims - 2], 1, False) if dims - 2 in _KERNEL else None


def refusal(module: nn.Module) -> str | None:
    """Say why the weights of this module cannot be replaced by a product, if so."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.max_norm is not None:
            return "max_norm writes into the weight in every forward; set max_norm=None"
        if module.sparse:
            return "sparse=True asks for sparse gradients, but a product's are dense; unset it"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq rescales rows of a gradient that a product lacks; unset it"
    return None
