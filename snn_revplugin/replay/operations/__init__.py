"""The table of operations that can be recomputed. Importing this package fills it."""

from . import (  # noqa: F401  (each fills the table)
    activation,
    attention,
    attention_on_cuda,
    fourier,
    in_place,
    linear,
    lookup,
    masked,
    normalisation,
    piecewise,
    pointwise,
    pooling,
    reduction,
    resampling,
    shape,
)
