"""Train factorized layers as what they are, products.

A factorized weight is a product, W = U Vᵀ. Two things about it go wrong by default, and two
replace them (Khodak et al., ICLR 2021, arXiv:2105.01029):

    spectral initialization    U = P √S, V = Q √S      from the dense weight, W ≈ P S Qᵀ
    Frobenius decay            ½·λ·‖U Vᵀ‖_F²           decays the product and not each factor,

    frobdecay.factorize(model, ratio=0.1)
    optimizer = frobdecay.FrobeniusDecay(torch.optim.SGD(model.parameters(), …), model)

where the gradient of the penalty costs a few r×r products: ∇_U = U (VᵀV), ∇_V = V (UᵀU).

A model:       factorize, plan_ranks, merge, unroll
Its files:     save_factorized, load_factorized, load_dense_
The optimizer: FrobeniusDecay, FrobeniusDecayFactory, Flambe, Spectron, split_param_groups
Products:      products, register_products, Product, Factor, explain
Their penalty: penalty, product_norm, add_penalty_grad_
Factors:       spectral_init, calibrate, Calibration, balance_
Weights:       LowRank, Tucker, TensorTrain, CP, FactoredTensor
What to watch: compare, diagnostics.measure, diagnostics.Recorder

Each begins its help with an example: ``help(frobdecay.factorize)``.
"""

from frobdecay import diagnostics
from frobdecay.algebra.spectral import spectral_init
from frobdecay.diagnostics.comparison import compare
from frobdecay.gradient.penalty import add_penalty_grad_, explain
from frobdecay.models.calibration.calibration import Calibration
from frobdecay.models.calibration.run import calibrate
from frobdecay.models.checkpoints import transformers as _transformers
from frobdecay.models.checkpoints.dense import load_dense_
from frobdecay.models.checkpoints.factorized import load_factorized, save_factorized
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge, unroll
from frobdecay.models.ranks import plan_ranks
from frobdecay.optim.factory import FrobeniusDecayFactory
from frobdecay.optim.flambe import Flambe
from frobdecay.optim.frobenius import FrobeniusDecay
from frobdecay.optim.groups import split_param_groups
from frobdecay.optim.spectral.spectron import Spectron
from frobdecay.product.balance import balance_
from frobdecay.product.factor import Factor
from frobdecay.product.find import products, register_products
from frobdecay.product.product import Product, penalty, product_norm
from frobdecay.weights.factored import FactoredTensor
from frobdecay.weights.lowrank import LowRank
from frobdecay.weights.tensors import CP, TensorTrain, Tucker

_transformers.when_imported("transformers.quantizers.auto", _transformers.register)
_transformers.when_imported("transformers.modeling_utils", _transformers.register_saving)

__version__ = "0.1.0"

__all__ = [
    "CP",
    "Calibration",
    "Factor",
    "FactoredTensor",
    "Flambe",
    "FrobeniusDecay",
    "FrobeniusDecayFactory",
    "LowRank",
    "Product",
    "Spectron",
    "TensorTrain",
    "Tucker",
    "add_penalty_grad_",
    "balance_",
    "calibrate",
    "compare",
    "diagnostics",
    "explain",
    "factorize",
    "load_dense_",
    "load_factorized",
    "merge",
    "penalty",
    "plan_ranks",
    "product_norm",
    "products",
    "register_products",
    "save_factorized",
    "spectral_init",
    "split_param_groups",
    "unroll",
]
