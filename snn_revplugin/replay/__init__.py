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
from .operation import OPERATIONS, DecidedBy, Operation, register
from .recipe import Kept, Output, Recipe, Spikes, Value
from .walk import FIRED, give_back, recipe_of

__all__ = [
    "FIRED",
    "OPERATIONS",
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
    "recipe_of",
    "register",
]
