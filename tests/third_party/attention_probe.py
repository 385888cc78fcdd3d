"""What attention modules of transformers compute, head by head, read off their own forward.

    module = build("transformers.models.llama.modeling_llama.LlamaAttention")
    scores, outputs = measured(bare(module), heads, width, size)

Nothing of the library is used, and no name of a weight. The softmax is watched and replaced: what
goes in, for known tokens x, is c·x (W_qᵀ W_k) xᵀ for every head, with c > 0 the same for all, up
to what is the same along a row; what comes out of the module, when every token attends to itself
in one head and to none in the others, is x (W_o W_v)ᵀ of that head. Rotary embeddings are those
of position 0 there, normalizations are taken out, gates are half open: what is left is what the
weights multiply to. The modules are made from their configurations, with other numbers of query
heads, of key heads, of tokens, and other sizes of heads.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import pathlib
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WIDTH, HEADS, GROUPS, SIZE, SIDE = 48, 6, 2, 8, 8
TOKENS = SIDE * SIDE
MASKED = -5e3  # scores below are masks

_NAMES: list[
    tuple[Any, str]
] = [  # options of configurations and modules, as transformers calls them
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim encoder_hidden_size emb_dim embedding_size nx "
        "kdim vdim cross_attention_hidden_size vision_hidden_size kv_dim qk_channels v_channels "
        "width hidden_dim in_channels embed_size q_dim k_dim v_dim query_dim channels in_dim "
        "q_input_dim",
    ),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads heads attention_heads nhead "
        "encoder_attention_heads decoder_attention_heads num_encoder_attention_heads "
        "num_decoder_attention_heads num_attn_heads",
    ),
    (
        GROUPS,
        "num_key_value_heads num_kv_heads num_hidden_layers num_layers n_layer n_layers "
        "encoder_layers decoder_layers",
    ),
    (SIZE, "head_dim d_kv kv_channels attention_head_dim d_head v_head_dim rotary_dim"),
    (0.0, "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob"),
    (64, "max_position_embeddings sliding_window n_positions n_ctx intermediate_size ffn_dim d_ff"),
    (1e6, "attn_logit_softcapping attn_logit_cap"),
    (True, "bias use_rel_pos"),
    (False, "is_causal is_cross_attention"),
]
OPTIONS: dict[str, Any] = {
    **{name: value for value, names in _NAMES for name in names.split()},
    **dict.fromkeys("layer_idx layer_id layer_number decoder_layer_idx".split(), 0),  # noqa: SIM905
    "vocab_size": 61, "hidden_act": "gelu", "window_size": SIDE, "image_size": 4 * SIDE,
    "patch_size": 4, "downsample_rate": 1, "layer_type": "full_attention", "attn_config": None,
    "input_size": (SIDE, SIDE), "attention_type": "original_full",
}  # fmt: skip


# --- making a module ----------------------------------------------------------------------------


def kind_of(name: str) -> type:
    """The class of a qualified name."""
    path, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(path), kind)  # type: ignore[no-any-return]


def build(name: str, **options: Any) -> nn.Module:
    """A tiny module of a class, from its own or its neighbours' configuration, in float64.

    Raises:
        ValueError: none could be made, with the reasons.
    """
    kind = kind_of(name)
    parameters = dict([*inspect.signature(kind.__init__).parameters.items()][1:])
    needed = [
        key
        for key, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (parameter.default is parameter.empty or "num_key_value" in key
             or key in ("bias", "config", "layer_idx", *options))
    ]  # fmt: skip
    reasons = []
    for config in _configurations(kind) if "config" in parameters else [None]:
        try:
            known = {**OPTIONS, **options}
            made = {key: _configured(config, options) if key == "config" else known[key]
                    for key in needed}  # fmt: skip
            module: nn.Module = kind(**made).eval()
            if sum(parameter.numel() for parameter in module.parameters()) > 1e6:
                raise ValueError("not a tiny one")
        except Exception as error:  # the next one may do
            reasons.append(f"{getattr(config, '__name__', None)}: {error!r:.90}")
        else:
            return _randomized(module.double())
    raise ValueError(f"{name}: {reasons[:3]}")


def _configurations(kind: type) -> list[type]:
    """Those that the class asks for, and its neighbours, the nearest name first."""
    module = importlib.import_module(kind.__module__)
    package = importlib.import_module(kind.__module__.rpartition(".")[0])
    annotation = inspect.signature(kind.__init__).parameters["config"].annotation
    if isinstance(annotation, str):
        annotation = vars(module).get(annotation.strip("'\""))
    files = pathlib.Path(str(package.__file__)).parent.glob("configuration_*.py")
    near = [
        value
        for path in (module.__name__, *(f"{package.__name__}.{f.stem}" for f in sorted(files)))
        for value in vars(importlib.import_module(path)).values()
        if getattr(value, "__module__", "").startswith(package.__name__)
    ]
    near.sort(key=lambda value: -_alike(getattr(value, "__name__", ""), kind.__name__))
    return [
        value
        for value in dict.fromkeys([*typing.get_args(annotation), annotation, *near])
        if isinstance(value, type) and issubclass(value, transformers.PretrainedConfig)
    ]


def _alike(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])


def _configured(kind: Any, options: dict[str, Any]) -> Any:
    default = kind()
    names = set(vars(default)) - set(kind.attribute_map)
    given = {
        name: value
        for name, value in OPTIONS.items()
        if name in names and not isinstance(getattr(default, name, None), list | tuple)
    } | options
    try:
        config = kind(**given)
    except Exception:  # where its checks refuse what one layer does not need
        config = default
        for name, value in given.items():
            setattr(config, name, value)
    for one in [config, *vars(config).values()]:
        if isinstance(one, transformers.PretrainedConfig):
            one._attn_implementation = "eager"
    return config


def _randomized(module: nn.Module) -> nn.Module:
    """Weights of one size, biases that matter, and normalizations that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            scales = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(0.3 * noise + (1 if scales else 0))
    return module


class _Pass(nn.Module):
    """In the place of a normalization."""

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        """What came in."""
        return x


def bare(module: nn.Module) -> nn.Module:
    """Take out normalizations, biases, sinks and scales of heads, open gates alike, in place."""
    for path, child in [*module.named_modules()]:
        projects = any(isinstance(one, nn.Linear) for one in child.modules())
        if path and "norm" in type(child).__name__.lower() and not projects:
            at, _, name = path.rpartition(".")
            setattr(module.get_submodule(at), name, _Pass())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(word in name for word in ("gate", "g_proj", "logit_scale")) or (
                name.endswith("bias") and parameter.ndim == 1
            ):
                parameter.zero_()
            elif "sink" in name:
                parameter.fill_(-1e4)
    return module


# --- calling it ---------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Keep what goes into a softmax, and put something else in its place.

    Args:
        attend: scores -> attention weights; softmax unless given.
        plain: do not normalize vectors either.
    """

    def __init__(self, attend: Callable[[Tensor], Tensor] | None = None, plain: bool = False):
        super().__init__()
        self.attend, self.plain = attend, plain
        self.scores: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See a softmax go by."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(*args, **kwargs)
        if name == "normalize" and self.plain:
            return args[0]
        if name in ("softmax", "_softmax"):
            scores = args[0] if args else kwargs["input"]
            self.scores.append(scores)
            if self.attend is not None:
                return self.attend(scores)
        return function(*args, **kwargs)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        *rest: Any, scale: float | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Torch's attention in one call, with a softmax to be seen."""
        shared = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(shared, -3) for part in (key, value))
        scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -1e30) if masked else scores + attn_mask
        self.scores.append(scores)
        return (scores.softmax(-1) if self.attend is None else self.attend(scores)) @ value


_STATES = frozenset(
    [
        "hidden_states",
        "hidden_state",
        "x",
        "query",
        "query_states",
        "queries",
        "inputs",
        "input",
        "hidden",
        "embeddings",
        "q",
        "hidden_states_query",
        "query_layer",
        "input_tensor",
        "residual",
        "hidden_query",
        "hidden_q",
    ]
)
_OTHERS = frozenset(
    [
        "key",
        "value",
        "key_states",
        "value_states",
        "k",
        "v",
        "context",
        "encoder_hidden_states",
        "memory",
        "key_value_states",
        "kv",
        "cross_attention_states",
        "keys",
        "values",
        "current_states",
        "hidden_kv",
        "ctx_att_tensor",
    ]
)
_POSITIONS = frozenset(
    [
        "position_embeddings",
        "rotary_pos_emb",
        "freqs_cis",
        "rotary_emb",
        "image_rotary_emb",
        "rotary_freqs",
        "freqs_ci",
        "position_encoding",
        "object_queries",
        "relative_position_embeddings",
        "cos",
        "sin",
    ]
)
_MASKS = frozenset(["attention_mask", "mask"])


def ways(
    module: nn.Module, angles: Tensor, tokens: Tensor, given: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Arguments that a forward may understand, the likelier ones first."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    counts = [
        many if names & set(parameters) else 1
        for many, names in ((5, _STATES), (2, _OTHERS), (8, _POSITIONS), (6, _MASKS))
    ]
    for way in sorted(itertools.product(*map(range, counts)), key=sum):
        yield {
            **{n: _argument(n, p, way, angles, tokens) for n, p in parameters.items()}, **given
        }  # fmt: skip


def _argument(name: str, parameter: Any, way: Any, angles: Tensor, tokens: Tensor) -> Any:
    """One argument, in one of the ways of shaping tokens, others, positions and masks."""
    shape, cross, side, mask = way
    needed = parameter.default is parameter.empty
    square = tokens.view(1, SIDE, SIDE, -1)
    states = (tokens[None], tokens, square, tokens[None, None], tokens[:, None])[shape]
    if name in _STATES and (needed or name != "query_states"):
        return states
    if name in _OTHERS:
        return states if needed or cross else None
    if name in _POSITIONS:
        turned = angles if shape == 1 else angles[None]
        cos, sin = torch.cos(turned), torch.sin(turned)
        found = (
            (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)), None, torch.zeros_like(states),
            (cos, sin), torch.polar(torch.ones_like(turned), turned),
            (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
            torch.cat([turned, turned], -1), torch.cat([sin, cos], -1),
        )[side]  # fmt: skip
        if name in ("cos", "sin"):
            return found[name == "sin"] if isinstance(found, tuple) else None
        return found
    if name in _MASKS:
        all_of, every = torch.ones(1, TOKENS, dtype=torch.bool), (1, 1, TOKENS, TOKENS)
        return (None, tokens.new_zeros(every), all_of, all_of.double(), all_of.expand(every),
                ~all_of.expand(every))[mask]  # fmt: skip
    if name == "position_ids":
        return torch.arange(TOKENS)[None] * int(angles.any())
    if name == "cu_seqlens":
        return torch.tensor([0, TOKENS], dtype=torch.int32)
    if name == "alibi":
        return tokens.new_zeros(HEADS, 1, TOKENS)
    if name in ("rel_pos", "rel_2d_pos") or (name == "position_bias" and needed):
        return tokens.new_zeros(*(1,) * (mask < 5), HEADS, TOKENS, TOKENS)
    return None if needed else parameter.default


def answer(module: nn.Module, arguments: dict[str, Any], watch: Watch | None = None) -> Tensor:
    """The first tensor that a forward returns."""
    with torch.no_grad(), watch or Watch():
        found = module(**arguments)
    while isinstance(found, tuple | list):
        found = found[0]
    assert isinstance(found, Tensor)
    return found


def understood(
    module: nn.Module, angles: Tensor, width: int = WIDTH, given: Any = None
) -> dict[str, Any]:
    """The first arguments that a forward runs with, through one softmax of all tokens.

    Args:
        module: the module.
        angles: of rotary embeddings, (tokens, size/2).
        width: of the tokens.
        given: angles -> arguments of the module's own.

    Raises:
        ValueError: there are none.
    """
    reasons: dict[str, None] = {}
    for arguments in ways(module, angles, tokens_of(width), given(angles) if given else {}):
        watch = Watch()
        try:
            found = answer(module, arguments, watch)
        except Exception as error:  # other arguments may do
            reasons[f"{error!r:.80}"] = None
            continue
        shapes = [tuple(scores.shape[-2:]) for scores in watch.scores]
        attended = shapes in ([(TOKENS, TOKENS)], [(TOKENS, TOKENS + 1)]) and found.isfinite().all()
        if attended and (watch.scores[0] > MASKED).any():
            return arguments
        reasons[f"attends by {shapes}"] = None
    raise ValueError(f"{type(module).__name__} takes none of these arguments: {[*reasons][:4]}")


def tokens_of(width: int) -> Tensor:
    """Tokens that are known."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, width, generator=generator, dtype=torch.float64)


def some_angles(size: int) -> Tensor:
    """Angles of a rotary embedding for heads of this size."""
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.rand(TOKENS, size // 2, generator=generator, dtype=torch.float64)


# --- reading it ---------------------------------------------------------------------------------


def measured(
    module: nn.Module, heads: int, width: int = WIDTH, size: int = SIZE, given: Any = None
) -> tuple[Tensor, Tensor]:
    """What goes into the softmax for the tokens, and what of them comes out, head by head.

    Returns:
        Scores (heads, tokens, tokens), ``centred``, NaN where they are masked; and (heads,
        tokens, width) what the module answers where every token attends to itself in one head
        and to none in the others, less what it answers where none attends.
    """
    arguments = understood(module, torch.zeros_like(some_angles(size)), width, given)
    seen: list[Tensor] = []
    for sign in (1, -1, 0):  # what is even in the tokens, less what is there without them
        watch = Watch(plain=True)
        turned = {name: _times(value, sign, width) for name, value in arguments.items()}
        answer(module, turned, watch)
        seen.append(watch.scores[0].double()[..., :TOKENS].reshape(heads, TOKENS, TOKENS))
    scores = (seen[0] + seen[1]) / 2 - seen[2]

    def attending(head: int | None) -> Tensor:
        def attend(scores: Tensor) -> Tensor:
            found = torch.zeros_like(scores)
            if head is not None:
                found.view(heads, TOKENS, -1)[head].fill_diagonal_(1)
            return found

        return answer(module, arguments, Watch(attend))

    silent = attending(None)
    outputs = torch.stack([attending(head) - silent for head in range(heads)])
    masked = scores.masked_fill(seen[0] < MASKED, torch.nan)
    return centred(masked), outputs.double().reshape(heads, TOKENS, -1)


def _times(value: Any, sign: int, width: int) -> Any:
    """The tokens in another sign, and whatever is no tokens as it is."""
    tokens = isinstance(value, Tensor) and value.shape[-1:] == (width,)
    return value * sign if tokens and value.numel() == TOKENS * width else value


def centred(scores: Tensor) -> Tensor:
    """Rows of mean 0 in what is not masked, as the softmax does not see their means."""
    return scores - scores.nanmean(-1, keepdim=True)


def multiple(found: Tensor, wanted: Tensor) -> float:
    """The c > 0 with which found is c·wanted, to 1e-5; NaN without one."""
    there = ~found.isnan()
    found, wanted = found[there], centred(wanted.masked_fill(~there, torch.nan))[there]
    c = float((found @ wanted) / (wanted @ wanted))
    return c if c > 0 and (found - c * wanted).norm() <= 1e-5 * found.norm() else float("nan")


# --- what types there are -----------------------------------------------------------------------


class Code(typing.NamedTuple):
    """Of a class: its code and that of its bases, their names, what it names, what it owns."""

    code: str
    bases: set[str]
    names: set[str]
    owns: bool


@functools.cache
def classes() -> dict[str, Code]:
    """Every class of the models of transformers by its full name; none is imported."""
    found = {}
    for path in pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        prefix = f"transformers.models.{path.parent.name}.{path.stem}."
        body = ast.parse(path.read_text("utf-8")).body
        own = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        tables = {  # such as of a class for each implementation
            target.id: _names(node)
            for node in body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        for name, node in own.items():
            line = [node]
            for one in line:
                line += [own[base] for base in _names(*one.bases) if base in own]
            code = "\n".join(ast.unparse(part) for one in line for part in one.body)
            names = _names(node)
            names = names.union(*(tables.get(one, set()) for one in names)) & set(own) - {name}
            found[prefix + name] = Code(
                code, {prefix + one.name for one in line}, {prefix + one for one in names},
                bool(re.search(r"(Linear|Conv\d?d?|Parameter|Embedding)\(", code)),
            )  # fmt: skip
    return found


def _names(*nodes: ast.AST) -> set[str]:
    return {one.id for node in nodes for one in ast.walk(node) if isinstance(one, ast.Name)}


def parts(types: dict[str, Code], name: str) -> set[str]:
    """What a class names, and what that does, as parts of it are."""
    found: set[str] = set()
    todo = [name]
    for one in todo:
        todo += types[one].names - found
        found |= types[one].names
    return found - {name}


def stacks(code: str) -> bool:
    """Whether a parameter of three dimensions, none of them 1, is made in this code."""
    shapes = []
    for call in ast.walk(ast.parse(code)):
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Parameter")):
            continue
        made = call.args[0] if call.args else None
        shape = made.args if isinstance(made, ast.Call) else []
        shapes.append(shape[0].elts if shape and isinstance(shape[0], ast.Tuple) else shape)
    return any(len(s) > 2 and "1" not in map(ast.unparse, s) for s in shapes)
