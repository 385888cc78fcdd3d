"""What the library promises, by number; a test that holds it to that is marked ``covers``.

Capabilities (C); defects of the released research code of Khodak et al. (2021) that this library
must not have (D); and pitfalls (P): what goes wrong, mostly in silence, where low-rank training,
parametrized weights and wrapped optimizers meet other software. The tests of a row:
``pytest --covers D2``.
"""

import ast
import functools
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent

ROWS = {
    "C1": "linear layers: two factors, bias, inputs of any batch shape",
    "C2": "two-dimensional convolutions, read spatially: exact index map, two convolutions or one",
    "C3": "strides, paddings and their modes, dilations, groups",
    "C4": "deep and wide layers, trained as one convolution and collapsed exactly",
    "C5": "embeddings, and weights that are tied",
    "C6": "query–key and output–value products: heads, fused, cross and grouped-query attention",
    "C7": "spectral initialization of a given weight or a fresh one, in float32 or better",
    "C8": "over-complete ranks without dead directions",
    "C9": "balanced heads that keep the function, from small decompositions",
    "C10": "initializations that are not spectral, with the variance of the product",
    "C11": "the penalty and its exact gradient: two, three and any number of factors, batches",
    "C12": "decay as a gradient, as a loss term and decoupled; a coefficient for each group",
    "C13": "order: unscale, accumulate, clip, decay; losses that are sums",
    "C14": "data parallel, sharded and tensor parallel training; what is refused",
    "C15": "param groups with the factors apart, told by identity",
    "C16": "factorizing by selectors, exact paths, shared and tied weights, dry runs",
    "C17": "ranks: a scale, numbers, by layer, by energy, for a budget with the share attained",
    "C18": "back to dense layers or to plain chains, exactly; factorized again at another rank",
    "C19": "Tucker, tensor train and CP: dimensions, ranks, decompositions, decay",
    "C20": "decay to compare with: of each factor, scaled by the kept share, none",
    "C21": "product norms recorded in one run and replayed in another",
    "C22": "diagnostics: norms, bound, balance, effective step, ranks",
    "C23": "FLAMBe, in the library's own definition",
    "C24": "checkpoints with shapes, ranks and a version; dtypes, devices, resuming",
    "C25": "the paper's experiments: models, protocols, interruption, tables, claims",
    "C26": "the defects of the research code, and the identities of the theory",
    "D1": "the decay of tensors is added after the backward pass and never acts",
    "D2": "convolutions are decomposed by another index map than they are applied by",
    "D3": "over-complete ranks get zero columns that never train",
    "D4": "the files cannot be imported",
    "D5": "lists of what not to decay are emptied before use: factors decay twice",
    "D6": "parameters are chosen by parts of their names: norms lose their decay",
    "D7": "scales of the plain initialization are listed by hand, one layer off",
    "D8": "a misspelled name in a list is met by nothing, silently",
    "D9": "a named initialization is called as if it were a function",
    "D10": "replacing a nested module loses its siblings",
    "D11": "resuming fails with several groups, or resets their options",
    "D12": "frozen factors get gradients and move",
    "D13": "no mixed precision: the decay vanishes in scaled gradients or overflows",
    "D14": "factors are float32 on the CPU whatever the weight was; half precision fails",
    "D15": "deprecated functions, and no truncated decomposition",
    "D16": "signs are left to chance, and NaN is not looked for",
    "D17": "groups and named paddings fail, padding modes are ignored, one kind of layer",
    "D18": "the memory format is dropped",
    "D19": "the bias is kept outside of the module tree",
    "D20": "weights of attention are held in lists and written through views",
    "D21": "a loop over modules and over heads, with dense decompositions",
    "D22": "writes that autograd, hooks and compilers do not see",
    "D23": "no way back to dense layers, and one fixed way to compute",
    "D24": "checkpoints without shapes, ranks or settings",
    "D25": "a tensor of the graph stays on the module: copies fail",
    "D26": "sharing the work between processes is wrong under data parallelism",
    "D27": "ranks relative to different sides; one searched scalar, no other rule",
    "D28": "no tests, test images for validation, half of a network left dense",
    "D29": "sparse gradients of lookup tables meet a dense decay",
    "D30": "with adaptive optimizers the decay goes through the moments",
    "P1": "decay of an adapter pulls to the pretrained weight instead of to zero",
    "P2": "the decoupled decay of an adapter's product has to be written by hand",
    "P3": "λ by layer or by schedule",
    "P4": "decay of bfloat16 parameters does nothing",
    "P5": "low-rank training from scratch diverges",
    "P6": "no decomposition of linear layers, or NaN from one",
    "P7": "adapters exist, factorized weights do not",
    "P8": "the dense weight is kept beside its factors",
    "P9": "the penalty as a loss term, also of three factors",
    "P10": "factorized layers are slower than dense ones",
    "P11": "a weight is computed anew at every access",
    "P12": "attention ignores the forward of its output projection",
    "P13": "dense checkpoints do not load",
    "P14": "from_pretrained draws factors anew",
    "P15": "a module cannot be pickled, or its copy is not apart",
    "P16": "half precision fails with a message about something else",
    "P17": "writes to the weight are lost",
    "P18": "a model on the meta device becomes NaN",
    "P19": "tied weights come apart, or cannot be tied again",
    "P20": "an optimizer built earlier lacks the factors",
    "P21": "freezing a weight after it was factorized",
    "P22": "an adapter merged into a factorized weight is lost",
    "P23": "compiling and exporting",
    "P24": "data parallel wrappers",
    "P25": "flat parameters of sharding engines",
    "P26": "sharding before and after factorizing",
    "P27": "tensor parallel plans fail on parametrized modules",
    "P28": "safetensors refuse shared memory",
    "P29": "it is not an Optimizer",
    "P30": "Accelerate does not see it",
    "P31": "its entries in the state break the base's",
    "P32": "groups go stale when a checkpoint is loaded",
    "P33": "hooks fire twice",
    "P34": "hooks are missing",
    "P35": "loss scalers key on the object and its step",
    "P36": "fused steps see scaled gradients",
    "P37": "closures are refused, or wipe the penalty",
    "P38": "resuming breaks",
    "P39": "the dummy step of distributed checkpoints leaks into moments",
    "P40": "parameters are swapped after the wrapping",
    "P41": "a state that does not survive a round trip before the first step",
    "P42": "train and eval of the base cannot be reached",
    "P43": "one fused call for parameters of several meshes",
    "P44": "DeepSpeed partitions",
    "P45": "optimizers of one layer each, or inside of the backward pass",
    "P46": "groups of a framework are hard to change",
}


@functools.cache
def covered() -> dict[str, list[tuple[str, str]]]:
    """Row -> tests marked with it and their decorators, of files whose packages may be missing."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
                continue
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.covers":
                    for row in map(ast.literal_eval, mark.args):
                        found.setdefault(row, []).append((f"{path.name}::{node.name}", decorators))
    return found


def test_marks_name_rows():
    """No test claims what is not promised."""
    assert set(covered()) <= set(ROWS)


@pytest.mark.covers("C26")
@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_tests_that_run(row):
    """At least one, and none that is skipped or expected to fail."""
    tests = covered()[row]
    hidden = [name for name, marks in tests if "mark.skip" in marks or "mark.xfail" in marks]
    assert tests
    assert not hidden
