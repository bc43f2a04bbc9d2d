"""Recipes: how backward recomputes a tensor that autograd would have saved.

Every class here answers ``value()`` with a tensor. :class:`Spikes` unpacks bits, a
:class:`HeldTensor` holds a tensor, a :class:`Recipe` runs an operation on the values of others. A
recipe that several readers share is computed once per backward pass, and its last reader drops it:

    add_reader()   forward adds a reader
    value()        a reader reads the value, in backward
    drop_reader()  a reader that was added will not read
    compute()      computes the value without counting a reader or caching it

A recipe adds itself as a reader of its inputs when its own first reader is added. A recipe without
readers counts for nothing.

Values are computed without gradients and without autocast (the operands have the dtypes that
autocast chose in forward), by the arithmetic of forward, so that they are equal bit for bit; or to
rounding, where :mod:`.together` computes those of several time steps at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..packed.integers import PackedIntegers
from ..packed.rows import UnpackedRows, rows_with
from ..packed.spikes import PackedSpikes
from ..torch_internals import capture
from ..torch_internals.distributed import is_freed
from ..torch_internals.pass_cache import PassCache, pass_cache
from ..torch_internals.tensors import storage_of
from ..torch_internals.versioned import Versioned, version_counter
from .kind import PLAIN, Kind

# a function of the operands' tensors that gives an operation's output, or a tuple of its outputs
Replay = Callable[..., Tensor | tuple[Tensor, ...]]

FREED = (
    "a tensor of shape {shape}, needed to recompute an activation, has been freed."
    " Under FSDP, shard the block that a weight and its neuron are in: fully_shard(block)."
)
DEEPEST_LIGHT = 4  # operations that forward may run once more


class Recomputable:
    """A tensor that backward can obtain.

    Attributes:
        derived: it is computed, so a saved copy would cost memory at every time step.
        driven: it depends on spikes or data, not on parameters alone.
        depth: operations between it and tensors that are held.
        work: operations, other than views, that compute it.
        exact: the recomputed value is equal bit for bit.
        cheap: it is what a neuron gave out (spikes unpack at little cost), or a view of that.
        light: a few light operations compute it from spikes and held tensors.
        identity: equal for two values that are sure to be the same at every time step; None if
            unknown.
        missing: it is only a place holder: backward cannot obtain the tensor.
    """

    __slots__ = ()
    derived = False
    depth = 0
    work = 0
    exact = True
    cheap = False
    light = False
    missing = False
    identity: tuple | None = None

    @property
    def driven(self) -> bool:
        return self.derived

    def value(self) -> Tensor:
        raise NotImplementedError

    def __call__(self) -> Tensor:
        return self.value()

    def compute(self, known: dict[int, Tensor] | None = None) -> Tensor:
        """Compute the value without counting a reader or caching it.

        Args:
            known: values that the same call has computed, by the ``id`` of their recipes.
        """
        return self.value()

    def consume(self) -> tuple[Tensor, bool]:
        """Read the value; the second item says whether the reader may overwrite it."""
        return self.value(), False

    def value_in_passing(self) -> Tensor:
        """Read the value; a light one does not stay in memory for the readers that follow."""
        return self.value()

    def add_reader(self) -> None:
        """Add a reader."""

    def drop_reader(self) -> None:
        """Remove a reader that will not read."""


def identity_of(held: Versioned) -> tuple:
    """What two objects have in common that hold the same memory, for as long as one of them does.

    The tensor object may be one of several for the same memory: autograd makes a new one at each
    request. The address is no identity either: FSDP frees a weight's memory, and the next weight
    may be allocated there.
    """
    tensor = held.tensor
    where = id(storage_of(tensor)), tensor.storage_offset()
    return where, held.version, tensor.dtype, tensor.shape, tensor.stride()


class HeldTensor(Recomputable):
    """A tensor that is not recomputed: data, a parameter, or what a boundary gave out.

    Args:
        tensor: it.
        boundary: the name of the boundary that lies between the tensor and spikes or data; None
            where there is none.
    """

    __slots__ = ("__weakref__", "boundary", "held")
    light = True

    def __init__(self, tensor: Tensor, boundary: str | None = None) -> None:
        self.held, self.boundary = Versioned(tensor), boundary

    @property
    def identity(self) -> tuple:
        return identity_of(self.held)

    @property
    def source(self) -> Tensor:
        """The tensor as the module has it."""
        return self.held.tensor

    def value(self) -> Tensor:
        tensor = self.held.get("an activation")
        if is_freed(tensor):
            raise RuntimeError(FREED.format(shape=tuple(tensor.shape)))
        return tensor.detach() if tensor.requires_grad else tensor


class Kept(Recomputable):
    """A value that is kept though it could be recomputed: the memory budget has room for it.

    Args:
        recipe: recomputes it, should the tensor be written into.
        tensor: it.
        saved_by_host: whether the host's graph saves the tensor, so that a write through ``.data``,
            which leaves no version, spoils the host's gradients too.
    """

    __slots__ = ("__weakref__", "_sum", "held", "recipe")
    derived = True

    def __init__(self, recipe: Recipe, tensor: Tensor, saved_by_host: bool) -> None:
        self.recipe, self.held = recipe, Versioned(tensor.detach())
        checks = not saved_by_host and capture.may_compare(tensor)
        self._sum = _bits_of_sum(self.held.tensor) if checks else None

    def value(self) -> Tensor:
        tensor = self.held.tensor
        unchanged = self.held.unchanged()
        if unchanged and self._sum is not None:
            unchanged = self._sum == _bits_of_sum(tensor)
        return tensor if unchanged else self.recipe.compute()


def _bits_of_sum(tensor: Tensor) -> bytes:
    return tensor.sum(dtype=torch.float64).numpy().tobytes()  # NaN equals itself by its bits


class TransposedLeaf(HeldTensor):
    """The transpose of a leaf, such as a linear layer takes of its weight at every time step.

    Args:
        leaf: it.
    """

    __slots__ = ("leaf",)

    def __init__(self, leaf: Tensor) -> None:
        super().__init__(leaf.detach().t())
        self.leaf = leaf

    @property
    def source(self) -> Tensor:
        return self.leaf

    def is_of(self, leaf: Tensor) -> bool:
        """Whether this is the transpose of a leaf as it is now."""
        held = self.held
        return (
            self.leaf is leaf
            and held.version == leaf._version
            and held.tensor.data_ptr() == leaf.data_ptr()
        )


class OpaqueWeight(HeldTensor):
    """A tensor that a boundary computed from parameters alone: a quantised weight, say.

    Args:
        tensor: it.
        boundary: the boundary's name.
    """

    __slots__ = ()


class Missing(Recomputable):
    """A place holder for a tensor that is not saved and cannot be recomputed.

    Args:
        boundary: the name of the boundary that gave the tensor out; None for a tensor of unknown
            origin.
        from_parameters: the boundary read parameters alone.
    """

    __slots__ = ("boundary", "from_parameters")
    missing = True

    def __init__(self, boundary: str | None = None, from_parameters: bool = False) -> None:
        self.boundary, self.from_parameters = boundary, from_parameters


class Shape(Recomputable):
    """A tensor of zeros, four bytes large, for a backward that reads the shape of its saved tensor
    and no element."""

    __slots__ = ("__weakref__", "shape", "zero")
    derived = True

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.zero = tensor.shape, tensor.new_zeros(())

    def value(self) -> Tensor:
        return self.zero.expand(self.shape)


class Spikes(Recomputable):
    """The spikes of a neuron below. Unpacking is cheap, so readers are not counted: they get a copy
    each, or share what is unpacked with the spikes of other time steps.

    Args:
        packed: the bits.
        given_out: the neuron's output tensor, whose version tells of writes into it.
    """

    __slots__ = ("_counter", "_version", "factor", "packed")
    derived = True
    cheap = True
    light = True

    def __init__(self, packed: PackedSpikes, given_out: Tensor | None = None) -> None:
        self.packed = packed
        self._counter, self._version = None, 0
        if given_out is not None:
            self._counter, self._version = version_counter(given_out), given_out._version
        self.factor = None if packed.factor is None else Versioned(packed.factor)

    def were_edited(self) -> bool:
        """Whether the tensor that the next layers read has been written into."""
        return self._counter is not None and self._counter._version != self._version

    def follows(self, earlier: Spikes) -> bool:
        """Whether ``earlier`` are those of the time step before, of the same neuron."""
        return self.packed.follows(earlier.packed) and (
            self.factor is None or self.factor.version == earlier.factor.version
        )

    def value(self) -> Tensor:
        return self.consume()[0]

    def joined(self, earlier: Spikes) -> Tensor:
        """The spikes from ``earlier`` ones of the same block to these, side by side along
        dimension 0."""
        rows = rows_with(self.packed, earlier.packed)
        if rows is None or not rows.have(earlier.packed):
            rows = UnpackedRows(self.packed, self.packed.row - earlier.packed.row + 1)
        return self._graded(rows.joined(earlier.packed, self.packed))

    def consume(self) -> tuple[Tensor, bool]:
        rows = rows_with(self.packed)
        if rows is None:
            return self._graded(self.packed.binary()), True
        return self._graded(rows.of(self.packed)), self.factor is not None

    def _graded(self, binary: Tensor) -> Tensor:
        if self.factor is None:
            return binary
        with torch.no_grad():
            return binary * self.factor.get("graded spikes")


class Integers(Recomputable):
    """Small whole numbers, packed. Unpacking is cheap: every reader gets a copy of its own, and
    readers are not counted."""

    __slots__ = ("__weakref__", "packed")
    derived = True
    light = True

    def __init__(self, packed: PackedIntegers) -> None:
        self.packed = packed

    def value(self) -> Tensor:
        with torch.no_grad():
            return self.packed.numbers()

    def consume(self) -> tuple[Tensor, bool]:
        return self.value(), True


class _Reading:
    """The readers of a recipe that are still to come in one backward pass."""

    __slots__ = ("left", "value")

    def __init__(self, left: int) -> None:
        self.left, self.value = left, None


class Recipe(Recomputable):
    """The outputs of an operation, from the values of its inputs.

    Args:
        function: takes the inputs' tensors to the output, or to a tuple of outputs.
        inputs: their values; None stands for an absent operand.
        kind: of the operation.
        identity: see :class:`Recomputable`.
        by_sample: see :class:`.operations.operation.Operation`.
    """

    __slots__ = (
        "__weakref__",
        "by_sample",
        "cheap",
        "depth",
        "derived",
        "driven",
        "exact",
        "function",
        "identity",
        "inputs",
        "is_view",
        "light",
        "readers",
        "work",
    )

    def __init__(
        self,
        function: Replay,
        inputs: tuple[Recomputable | None, ...],
        kind: Kind = PLAIN,
        identity: tuple | None = None,
        by_sample: int | None = None,
    ) -> None:
        self.function, self.inputs, self.identity, self.readers = function, inputs, identity, 0
        self.by_sample = by_sample
        self.is_view = is_view = kind.is_view
        self.cheap = is_view and inputs[0].cheap
        self.driven = kind.recompute_on_data
        self.derived, self.exact = kind.recompute_always or self.driven, True
        self.depth, self.work, self.light = 1, int(not is_view), kind.light
        for each in inputs:
            if each is not None:
                self.derived = self.derived or each.derived
                self.driven = self.driven or each.driven
                self.exact = self.exact and each.exact
                self.depth = max(self.depth, each.depth + 1)
                self.work += each.work
                self.light = self.light and each.light and self.depth <= DEEPEST_LIGHT

    def add_reader(self) -> None:
        if self.readers == 0:
            for each in self.inputs:
                if each is not None:
                    each.add_reader()
        self.readers += 1

    def value(self) -> Tensor:
        return self.consume()[0]

    def were_edited(self) -> bool:
        """Whether the spikes that this is a view of have been written into."""
        return self.inputs[0].were_edited()

    def consume(self) -> tuple[Tensor, bool]:
        values, reading = self._next_reader()
        value, owned = reading.value, False
        if value is None:
            value, owned = self._compute()
        if reading.left <= 0:
            values.pop(self, None)
            return value, owned
        if not self.cheap:
            reading.value = value
        return value, owned and self.cheap

    def value_in_passing(self) -> Tensor:
        reading = pass_cache().get(self)
        left = self.readers if reading is None else reading.left
        if not self.light or left <= 1 or (reading is not None and reading.value is not None):
            return self.value()
        self._next_reader()
        return self.compute()  # its inputs are read when it is computed for the readers that follow

    def leave(self, value: Tensor | tuple[Tensor, ...], values: PassCache) -> None:
        """Leave the value for the readers of this backward pass, of whom none has come yet. It has
        been computed from the inputs' values, read in this recipe's name."""
        reading = values[self] = _Reading(self.readers)
        reading.value = value

    def count_reader(self) -> _Reading | None:
        """Count one reader of this backward pass, who has the value from elsewhere; None if it was
        the last one."""
        values, reading = self._next_reader()
        if reading.left > 0:
            return reading
        del values[self]
        return None

    def _next_reader(self) -> tuple[PassCache, _Reading]:
        """Count one reader of this backward pass, which reads or will not read."""
        values = pass_cache()
        reading = values.get(self)
        if reading is None:
            reading = values[self] = _Reading(self.readers)
        reading.left -= 1
        return values, reading

    def compute(self, known: dict[int, Tensor] | None = None) -> Tensor:
        reading = pass_cache().get(self)
        if reading is not None and reading.value is not None:
            return reading.value
        if self.light:  # costs less than to hold what is on the way
            return run(self.function, self._operands(lambda each: each.compute()))
        known = {} if known is None else known
        if id(self) not in known:
            operands = [each and each.compute(known) for each in self.inputs]
            known[id(self)] = run(self.function, operands)
        return known[id(self)]

    def _operands(self, read: Callable[[Recomputable], Tensor]) -> list[Tensor | None]:
        """The inputs' tensors, the deepest first: what is on the way to it is freed before the
        others are unpacked."""
        operands: list[Tensor | None] = [None] * len(self.inputs)
        present = [i for i, each in enumerate(self.inputs) if each is not None]
        for i in sorted(present, key=lambda i: -self.inputs[i].depth):
            operands[i] = read(self.inputs[i])
        return operands

    def drop_reader(self) -> None:
        values, reading = self._next_reader()
        if reading.left <= 0:
            del values[self]
            if reading.value is None:
                for each in self.inputs:
                    if each is not None:
                        each.drop_reader()

    def _compute(self) -> tuple[Tensor, bool]:
        if self.is_view:
            operand, owned = self.inputs[0].consume()
            return run(self.function, [operand]), owned
        if self.light:  # else all sums below a sum would stand until backward comes to their layers
            return run(self.function, self._operands(lambda each: each.value_in_passing())), True
        return run(self.function, [each and each.value() for each in self.inputs]), True


class Output(Recomputable):
    """One of several outputs of a recipe, such as the indices of max pooling."""

    __slots__ = ("index", "recipe")

    def __init__(self, recipe: Recipe, index: int) -> None:
        self.recipe, self.index = recipe, index

    @property
    def derived(self) -> bool:
        return self.recipe.derived

    @property
    def driven(self) -> bool:
        return self.recipe.driven

    def value(self) -> Tensor:
        return self.recipe.value()[self.index]

    def consume(self) -> tuple[Tensor, bool]:
        outputs, owned = self.recipe.consume()
        return outputs[self.index], owned

    @property
    def identity(self) -> tuple | None:
        return self.recipe.identity and (*self.recipe.identity, self.index)

    @property
    def depth(self) -> int:
        return self.recipe.depth

    @property
    def work(self) -> int:
        return self.recipe.work

    @property
    def exact(self) -> bool:
        return self.recipe.exact

    def compute(self, known: dict[int, Tensor] | None = None) -> Tensor:
        return self.recipe.compute(known)[self.index]

    def add_reader(self) -> None:
        self.recipe.add_reader()

    def drop_reader(self) -> None:
        self.recipe.drop_reader()


class Operand(Recomputable):
    """One input of a recipe, for the node that saved it. A walk that comes to the node again finds
    the recipe through it.

    Args:
        recipe: of the node.
        position: of the input.
        memory_format: in which the node's backward reads an input of spikes; None for the format
            that the node saved.
    """

    __slots__ = ("memory_format", "position", "recipe")

    def __init__(
        self, recipe: Recipe, position: int, memory_format: torch.memory_format | None = None
    ) -> None:
        self.recipe, self.position, self.memory_format = recipe, position, memory_format

    def value(self) -> Tensor:
        value = self.recipe.inputs[self.position].value()
        return (
            value
            if self.memory_format is None
            else value.contiguous(memory_format=self.memory_format)
        )


class Copy(Recomputable):
    """A value for a reader that may write into it.

    Args:
        of: the value.
    """

    __slots__ = ("of",)
    derived = True

    def __init__(self, of: Recomputable) -> None:
        self.of = of

    def value(self) -> Tensor:
        value, owned = self.of.consume()
        return value if owned else value.clone()

    def add_reader(self) -> None:
        self.of.add_reader()


def run(function: Replay, operands: list[Tensor | None]) -> Tensor | tuple[Tensor, ...]:
    """The function of some operands, without gradients and without autocast."""
    device = next((each.device.type for each in operands if each is not None), "cpu")
    if torch.is_autocast_enabled(device):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*operands)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return function(*operands)
    return function(*operands)
