"""FrobeniusDecayFactory: the optimizer for those who ask for a recipe instead of an object."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from frobdecay.algebra.precision import Coefficient
from frobdecay.optim.frobenius import FrobeniusDecay, Mode
from frobdecay.optim.groups import split_param_groups
from frobdecay.product.names import Selector

_UNFIT = {"model", "optimizer_dict"}  # what Trainer passes to optimizers of the backward pass


class FrobeniusDecayFactory:
    """Build groups, optimizer and wrapper for a factorized model, in one call.

    Examples:
        >>> import torch, frobdecay
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> plan = frobdecay.factorize(model, rank=4)
        >>> build = FrobeniusDecayFactory()
        >>> optimizer = build(model, optimizer=torch.optim.AdamW, weight_decay=0.1)
        >>> [(g["weight_decay"], g["frobenius_decay"]) for g in optimizer.param_groups]
        [(0.0, 0.0), (0.0, 0.1)]

    An optimizer factory of transformers, so that its ``Trainer`` decays products in one line:

        Trainer(model, args, …, optimizer_cls_and_kwargs=(FrobeniusDecayFactory, {"args": args}))

    which takes optimizer, learning rate, betas and weight decay from the training arguments. Or
    name them: ``{"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 1e-4}``. Groups are
    those of ``split_param_groups``. It works with ``model_init``, which has to factorize.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[..., Optimizer] | None = None,
        args: Any = None,
        weight_decay: Coefficient | None = None,
        no_decay: Selector = (),
        decay: Coefficient | None = None,
        mode: Mode = "auto",
        bound: Coefficient | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> FrobeniusDecay:
        """Build the optimizer.

        Args:
            model: factorized.
            optimizer: makes the base optimizer from param groups and ``options``.
            args: ``transformers.TrainingArguments``, which say what is not said here.
            weight_decay: of dense weights and products.
            no_decay: see ``split_param_groups``; factors among it decay neither way.
            decay: λ of the products, if it is another.
            mode: see ``FrobeniusDecay``.
            bound: see ``FrobeniusDecay``.
            backend: see ``FrobeniusDecay``.
            options: further arguments of ``optimizer``.

        Raises:
            TypeError: neither ``optimizer`` nor ``args``.
            ValueError: ``args`` ask for an optimizer that updates in the backward pass, or what
                ``split_param_groups`` and ``FrobeniusDecay`` refuse.
        """
        said: dict[str, Any] = {}
        if args is not None:
            weight_decay = args.weight_decay if weight_decay is None else weight_decay
            if optimizer is None:
                optimizer, said = _asked_for(args, model)
            else:
                said = {"lr": args.learning_rate}
        if optimizer is None:
            raise TypeError("expected optimizer=… or args=TrainingArguments(…), got neither")
        groups = said.pop("params", None)
        if groups is None:
            groups = split_param_groups(
                model, 0.0 if weight_decay is None else weight_decay, no_decay=no_decay, decay=decay
            )
            decay = None
        base = optimizer(groups, **{**said, **options})
        return FrobeniusDecay(base, model, decay=decay, mode=mode, bound=bound, backend=backend)


def _asked_for(args: Any, model: nn.Module) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """The optimizer and options that ``TrainingArguments`` ask for."""
    trainer = importlib.import_module("transformers").Trainer
    optimizer, options = trainer.get_optimizer_cls_and_kwargs(args, model)
    if not _UNFIT.isdisjoint(options):
        raise ValueError(
            f"expected optim= of the training arguments to be an optimizer with steps, got "
            f"{str(args.optim)!r}: it updates in the backward pass, where products cannot decay"
        )
    return optimizer, dict(options)
