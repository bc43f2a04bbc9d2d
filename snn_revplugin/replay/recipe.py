"""Recipes: how a tensor that autograd would keep is had again in backward.

Every class here answers ``value()`` with a tensor. :class:`Spikes` unpacks bits, :class:`Kept`
holds a tensor that is there anyway, a :class:`Recipe` runs an operation on the values of others. A
recipe that several readers share is computed once a backward pass and dropped by its last reader:

    expect()    a reader announces itself, in forward value()     a reader reads, in backward
    release()   a reader that announced itself will not read peek()      the value for someone who
    never announced himself; nothing is counted and nothing kept

A recipe announces itself to its inputs when its own first reader comes: one that nobody reads
counts for nothing.

Values are computed without gradients, without autocast (the operands carry the dtypes that it chose
in forward), and in the arithmetic of the first time, so that they come back bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed.spikes import PackedSpikes
from ..torch_internals.distributed import is_freed
from ..torch_internals.pass_cache import PassCache, pass_cache
from ..torch_internals.tensors import storage_of
from ..torch_internals.versioned import Versioned, version_counter
from .operations.operation import Replay

FREED = (
    "a tensor of shape {shape}, needed to compute an activation again, has no memory any more."
    " Under FSDP, shard the block that a weight and its neuron are in: fully_shard(block)."
)
DEEPEST_LIGHT = 4  # operations that it is still worth while to do once more in forward


class Recomputable:
    """A tensor that can be had in backward."""

    __slots__ = ()
    derived = (
        False  # whether it is computed, so that it costs memory at every time step if it is kept
    )
    depth = 0  # operations between it and what is at hand
    work = 0  # operations, other than views, that it takes to have it
    exact = True  # whether it comes back bit for bit
    cheap = False  # spikes or a view of spikes: to be had again for less than it costs to keep
    light = (
        False  # made of spikes and of what is there by a few operations that go element by element
    )
    identity: tuple | None = (
        None  # equal for two values that are sure to be the same at every time step
    )

    @property
    def driven(self) -> bool:
        """Whether it depends on spikes or data, not on parameters alone."""
        return self.derived

    def value(self) -> Tensor:
        raise NotImplementedError

    def __call__(self) -> Tensor:
        return self.value()

    def compute(self, known: dict[int, Tensor] | None = None) -> Tensor:
        return self.value()

    def consume(self) -> tuple[Tensor, bool]:
        """The value, and whether the reader may overwrite it."""
        return self.value(), False

    def add_reader(self) -> None:
        """Announce a reader."""

    def drop_reader(self) -> None:
        """Withdraw a reader."""


class HeldTensor(Recomputable):
    """A tensor that is there anyway: data, a parameter, or what an operation that nobody knows gave
    out."""

    __slots__ = ("__weakref__", "held")
    light = True

    def __init__(self, tensor: Tensor) -> None:
        self.held = Versioned(tensor)

    @property
    def identity(self) -> tuple:
        # The tensor object may be one of several for the same memory: autograd makes a new one each
        # time it is asked. Nor is the address its identity: FSDP frees a weight's memory, and the
        # next one's may come to lie there.
        tensor = self.held.tensor
        where = id(storage_of(tensor)), tensor.storage_offset()
        return where, self.held.version, tensor.dtype, tensor.shape, tensor.stride()

    def value(self) -> Tensor:
        tensor = self.held.get("an activation")
        if is_freed(tensor):
            raise RuntimeError(FREED.format(shape=tuple(tensor.shape)))
        return tensor.detach() if tensor.requires_grad else tensor


class MadeFromParameters(HeldTensor):
    """A tensor that an operation which nobody knows made of parameters alone: a quantised weight,
    say.

    Args:
        kind: the operation's node.
    """

    __slots__ = ("kind",)

    def __init__(self, tensor: Tensor, kind: str) -> None:
        super().__init__(tensor)
        self.kind = kind


class UnheldFromParameters(Recomputable):
    """The same where nobody has the tensor."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Shape(Recomputable):
    """A tensor of zeros, four bytes large, for a backward that reads the shape of what it saved and
    no element."""

    __slots__ = ("__weakref__", "shape", "zero")
    derived = True

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.zero = tensor.shape, tensor.new_zeros(())

    def value(self) -> Tensor:
        return self.zero.expand(self.shape)


class Spikes(Recomputable):
    """The spikes of a neuron below. Unpacking is cheap, so every reader gets a copy of its own and
    nothing is counted.

    Args:
        packed: the bits.
        given_out: the tensor that the neuron gave out, to notice if somebody writes into it.
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
        """Whether the spikes that went on to the next layer are other ones by now."""
        return self._counter is not None and self._counter._version != self._version

    def value(self) -> Tensor:
        if self.factor is not None:
            self.factor.get("graded spikes")
        with torch.no_grad():
            return self.packed.spikes()

    def consume(self) -> tuple[Tensor, bool]:
        return self.value(), True


class _Reading:
    """How far the readers of a recipe have come in one backward pass."""

    __slots__ = ("left", "value")

    def __init__(self, left: int) -> None:
        self.left, self.value = left, None


class Recipe(Recomputable):
    """The outputs of an operation, from the values of its inputs.

    Args:
        function: takes the inputs' tensors to the output, or to a tuple of outputs.
        inputs: their values; None stands for an absent operand.
        is_view: whether the output shares memory with the first input.
        pointwise: whether the function goes element by element.
        derived, driven: whether it is so whatever the inputs are.
        identity: see :class:`Value`.
    """

    __slots__ = (
        "__weakref__",
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
        is_view: bool = False,
        derived: bool = False,
        driven: bool = False,
        identity: tuple | None = None,
        pointwise: bool = False,
    ) -> None:
        self.function, self.inputs, self.identity, self.readers = function, inputs, identity, 0
        self.is_view, self.cheap = is_view, is_view and inputs[0].cheap
        self.derived, self.driven, self.exact = derived or driven, driven, True
        self.depth, self.work, self.light = 1, int(not is_view), is_view or pointwise
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
        """Of a view of spikes: as of the spikes."""
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

    def _next_reader(self) -> tuple[PassCache, _Reading]:
        """One reader of this backward pass has come, or will not come; how many are left."""
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
        known = (
            {} if known is None else known
        )  # what this one look has computed, for inputs that are reached by two ways
        if id(self) not in known:
            operands = [each and each.compute(known) for each in self.inputs]
            known[id(self)] = _run(self.function, operands)
        return known[id(self)]

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
            return _run(self.function, [operand]), owned
        return _run(self.function, [each and each.value() for each in self.inputs]), True


class Output(Recomputable):
    """One of several outputs of a recipe, such as the indices that max pooling found."""

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
    """One input of a recipe, for the node that saved it; a walk that comes to that node again finds
    the recipe through it.

    Args:
        memory_format: of a spike tensor, where the node's backward had better have another one than
            it saved.
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


def _run(function: Replay, operands: list[Tensor | None]) -> Tensor | tuple[Tensor, ...]:
    device = next((each.device.type for each in operands if each is not None), "cpu")
    if torch.is_autocast_enabled(device):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*operands)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return function(*operands)
    return function(*operands)
