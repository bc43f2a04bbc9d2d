"""The entry of the walk: a neuron hands its input current in and gets its recipe."""

from __future__ import annotations

from torch import Tensor

from ..settings import get_settings
from ..torch_internals import graph, saved_tensors
from .batch_norm import inverse_batch_norm
from .keeping import CallInStep
from .recipe import OpaqueWeight, Recomputable
from .walk import SAME_ELEMENTS, Place, Walk, WalkRecord

BATCH_NORM_INVERTED = "inverse of NativeBatchNormBackward0"
SMALL = "small tensors"


def attach_recipes(
    current: Tensor,
    record: WalkRecord,
    whole_sequence: bool = False,
    call: CallInStep | None = None,
) -> Recomputable | None:
    """Replace what autograd saved on the way to a neuron's input current by recipes.

    Args:
        current: it.
        record: of the neuron.
        whole_sequence: the current is that of all time steps, for a neuron whose backward decides
            no spike. It may then be part of a residual stream, and be recomputed up to rounding
            (``exact`` tells).
        call: of the neuron, as part of a training step under a memory budget.

    Returns:
        The recipe of the current. None if the current depends on neither spikes nor data through
        operations that the table knows, or is too small to be worth a recipe: the neuron should
        keep its membrane potential.
    """
    if current.grad_fn is None:
        return None
    small = None if whole_sequence else _small(current)
    if small is not None and small in record.cache.small:
        record.statistics.small_calls += 1
        record.statistics.kept_bytes[SMALL] += record.cache.small[small]
        return None
    if call is not None and not whole_sequence and not call.observes and call.keeps(0):
        return None
    walk = Walk(record, whole_sequence, call)
    place = Place(current.grad_fn, current.output_nr, current, current.stride())
    value = walk.value_of(place)
    replaced = walk.replaced_bytes + walk.repeatable_bytes
    if small is not None and _is_small(current.nbytes + replaced):
        # From the next such step on: the work is done for this one.
        record.cache.small[small] = replaced
    if call is not None and not whole_sequence and call.observes:
        call.keeps(current.nbytes + replaced)
    if isinstance(value, OpaqueWeight):
        record.statistics.boundaries[value.boundary] += 1
    return value if value.derived and (value.exact or whole_sequence) else None


def _small(current: Tensor) -> tuple | None:
    """What tells a small current from others; None for a large one."""
    return (current.shape, type(current.grad_fn)) if _is_small(current.nbytes) else None


def _is_small(nbytes: int) -> bool:
    return nbytes <= get_settings().recompute_min_bytes


def attach_inverse_recipe(current: Tensor, given: Recomputable, record: WalkRecord) -> None:
    """Replace what autograd saved on the way to the current of a neuron that reconstructs its
    current, and needs no recipe for it.

    Args:
        current: it.
        given: the current, as the neuron reconstructs it.
        record: of the neuron.
    """
    node = current.grad_fn
    while node is not None and graph.name_of(node) in SAME_ELEMENTS:
        node = node.next_functions[0][0]
    # A tensor that was written into is not the norm's output any more.
    is_output = node is not None and current._version == 0
    inverse = inverse_batch_norm(node, given, record.cache.held) if is_output else None
    if inverse is not None and saved_tensors.replace_saved(node, "input", inverse):
        inverse.add_reader()
        record.statistics.operations[BATCH_NORM_INVERTED] += 1
        # Nothing reads a recomputation of what feeds the norm, so it does not count.
        Walk(record).value_of(Place(node, 0, counts=False))
    else:
        attach_recipes(current, record)
