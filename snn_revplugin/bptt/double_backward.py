"""Gradients that are differentiated again (``create_graph=True``): gradient penalties, MAML.

A step's closed-form derivative is a value without a graph. So a Function saves its input and its
states as autograd saves tensors, with their edges in the graph but with a function in the place of
their memory (``torch_internals.saved_tensors.save_edges``). Where a backward records a graph, the
step is repeated in differentiable torch code from those tensors, and autograd differentiates that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..neurons.transition import Transition
from .chain import ChainLink, StepView

Inputs = tuple[Tensor, ...]


class InputsOfStep:
    """Recomputes the input of a time step, and the states before it."""

    __slots__ = ("link",)

    def __init__(self, link: ChainLink) -> None:
        self.link = link

    @torch.no_grad()
    def __call__(self, position: int) -> Tensor:
        return self._input() if position == 0 else self.link.before.states()[position - 1]

    def _input(self) -> Tensor:
        link = self.link
        if link.current is not None:
            return link.current.compute()
        view, transition = StepView.of(link), link.transition.plain
        if transition.from_outputs:
            return transition.recover_inputs(link.fired, False, view.outputs)
        return transition.recover_current(view.charged, view.before[0], view.reset_signal)


class InputsOfPotential:
    """Recomputes what the membrane potential of a time step is charged from: the synaptic current
    after it, and the potential before it."""

    __slots__ = ("link",)

    def __init__(self, link: ChainLink) -> None:
        self.link = link

    @torch.no_grad()
    def __call__(self, position: int) -> Tensor:
        return (self.link.before if position else self.link).states()[position]


class ChargedOfStep:
    """Recomputes the charged potential of a time step, and its outputs.

    Holds the step weakly: the nodes below hold it. The node that resets may outlive them, where no
    loss reaches the last potential.
    """

    __slots__ = ("_link",)

    def __init__(self, link: ChainLink) -> None:
        self._link = weakref.ref(link)

    @torch.no_grad()
    def __call__(self, position: int) -> Tensor:
        link = self._link()
        return StepView.of(link).charged if position == 0 else link.fired.spikes()


def differentiate_with_graph(
    function: Callable[..., tuple[Tensor, ...]],
    transition: Transition,
    inputs: Inputs,
    grads: Sequence[Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The derivative of ``function(transition, *inputs)``, with a graph of its own.

    Args:
        inputs: as autograd saved them, with their edges.
        grads: the gradients at what the function gives.

    Returns:
        The gradients at the inputs, and at the transition's parameters.
    """
    transition = transition.plain
    with torch.enable_grad():
        # Aliases end the derivative here: a state's own history leads to the parameters, and may
        # lead to the input.
        aliases = [
            each.view_as(each) if each.requires_grad else each
            for each in (*inputs, *transition.parameters)
        ]
        own = transition.with_parameters(aliases[len(inputs) :])
        outputs = function(own, *aliases[: len(inputs)])
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        wanted = [each for each in aliases if each.requires_grad]
        found = iter(())
        if pairs and wanted:
            heads, at_heads = zip(*pairs, strict=True)
            found = iter(
                torch.autograd.grad(heads, wanted, at_heads, create_graph=True, allow_unused=True)
            )
        gradients = tuple(next(found, None) if each.requires_grad else None for each in aliases)
    return gradients[: len(inputs)], gradients[len(inputs) :]
