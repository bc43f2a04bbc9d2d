"""The table of operations that can be recomputed. Importing this package fills it."""

from . import (  # noqa: F401  (each fills the table)
    activation,
    attention,
    attention_on_cuda,
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
