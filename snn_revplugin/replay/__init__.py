"""Computing again in backward what autograd would have kept: recipes, the walk that leaves them,
the operations it knows."""

from . import operations  # noqa: F401  (fills the table)
from .cache import RecipeCache
from .operations.normalisation import Normed, normed
from .operations.operation import OPERATIONS, DecidedBy, Operation, operation_of, register
from .recipe import HeldTensor, Output, Recipe, Recomputable, Spikes
from .walk import FIRED, UNSEEN, attach_inverse_recipe, attach_recipes

__all__ = [
    "FIRED",
    "OPERATIONS",
    "UNSEEN",
    "DecidedBy",
    "HeldTensor",
    "Normed",
    "Operation",
    "Output",
    "Recipe",
    "RecipeCache",
    "Recomputable",
    "Spikes",
    "attach_inverse_recipe",
    "attach_recipes",
    "normed",
    "operation_of",
    "register",
]
