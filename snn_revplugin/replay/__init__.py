"""Recomputing in backward what autograd would have saved: recipes, the walk that attaches them, the
operations that it knows."""

from . import operations  # noqa: F401  (fills the table)
from .attach import attach_inverse_recipe, attach_recipes
from .batch_norm import Normed, normed
from .cache import RecipeCache
from .keeping import CallInStep, TrainingStep, observe
from .kind import COPY, ELEMENTWISE, LAYER, PARAMETRISATION, PLAIN, SPLIT, VIEW, Kind
from .operations.operation import OPERATIONS, DecidedBy, Operation, operation_of, register
from .readers import ReaderRecord, Readers, ReaderStatistics
from .recipe import HeldTensor, Output, Recipe, Recomputable, Spikes
from .together import read_together
from .walk import FIRED, UNSEEN

__all__ = [
    "COPY",
    "ELEMENTWISE",
    "FIRED",
    "LAYER",
    "OPERATIONS",
    "PARAMETRISATION",
    "PLAIN",
    "SPLIT",
    "UNSEEN",
    "VIEW",
    "CallInStep",
    "DecidedBy",
    "HeldTensor",
    "Kind",
    "Normed",
    "Operation",
    "Output",
    "ReaderRecord",
    "ReaderStatistics",
    "Readers",
    "Recipe",
    "RecipeCache",
    "Recomputable",
    "Spikes",
    "TrainingStep",
    "attach_inverse_recipe",
    "attach_recipes",
    "normed",
    "observe",
    "operation_of",
    "read_together",
    "register",
]
