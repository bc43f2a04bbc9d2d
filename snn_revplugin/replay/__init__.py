"""Computing again in backward what autograd would have kept: recipes, the walk that leaves them, the operations it knows."""

from . import (  # noqa: F401  (each fills the table)
    activation,
    attention,
    in_place,
    linear,
    lookup,
    normalisation,
    piecewise,
    pointwise,
    pooling,
    reduction,
    resampling,
    shape,
)
from .known import Known
from .normalisation import Normed, normed
from .operation import OPERATIONS, DecidedBy, Operation, operation_of, register
from .recipe import Kept, Output, Recipe, Spikes, Value
from .walk import FIRED, UNSEEN, give_back, recipe_of

__all__ = [
    "FIRED",
    "OPERATIONS",
    "UNSEEN",
    "DecidedBy",
    "Kept",
    "Known",
    "Normed",
    "Operation",
    "Output",
    "Recipe",
    "Spikes",
    "Value",
    "give_back",
    "normed",
    "operation_of",
    "recipe_of",
    "register",
]
