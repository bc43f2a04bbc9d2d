"""Functions of one element: activations, exponentials, roots, roundings. A node saves its input,
its output or nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...torch_internals.graph import Node
from ..kind import ELEMENTWISE, PLAIN
from ..recipe import Replay
from .operation import ONE, Operation, register
from .shape import applying

aten = torch.ops.aten
RESULT = {"result": 0}


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return aten.gelu(x, approximate=approximate)


def _always(function: Replay) -> Callable[[Node], Replay]:
    return lambda _: function


def _saves_output(name: str, function: Replay, *attributes: str, form: int = 0) -> Operation:
    replay = applying(function, *attributes) if attributes else _always(function)
    return Operation(f"{name}Backward{form}", ELEMENTWISE, ONE, replay, RESULT, by_sample=0)


def _saves_input(name: str, function: Replay, *attributes: str) -> Operation:
    replay = applying(function, *attributes) if attributes else _always(function)
    return Operation(f"{name}Backward0", ELEMENTWISE, ("self",), replay, by_sample=0)


def _saves_nothing(name: str, function: Replay) -> Operation:
    return Operation(f"{name}Backward0", ELEMENTWISE, ONE, _always(function), by_sample=0)


register(
    _saves_output("Relu", torch.relu),
    _saves_output("Sigmoid", torch.sigmoid),
    _saves_output("Tanh", torch.tanh),
    _saves_output("Exp", torch.exp),
    _saves_output("Exp2", torch.exp2),
    _saves_output("Expm1", torch.expm1),
    _saves_output("Sqrt", torch.sqrt),
    _saves_output("Rsqrt", torch.rsqrt),
    _saves_output("Reciprocal", torch.reciprocal),
    _saves_output("Tan", torch.tan),
    # in place
    _saves_output("Elu", aten.elu, "alpha", "scale", "input_scale", form=1),
    _saves_output("Celu", aten.celu, "alpha", form=1),
    _saves_input("Gelu", _gelu, "approximate"),
    _saves_input("Silu", torch.nn.functional.silu),
    _saves_input("Elu", aten.elu, "alpha", "scale", "input_scale"),
    _saves_input("Celu", aten.celu, "alpha"),
    _saves_input("Softplus", aten.softplus, "beta", "threshold"),
    _saves_input("Mish", torch.nn.functional.mish),
    _saves_input("Hardswish", torch.nn.functional.hardswish),
    _saves_input("Hardsigmoid", torch.nn.functional.hardsigmoid),
    _saves_input("Hardshrink", aten.hardshrink, "lambd"),
    _saves_input("Softshrink", aten.softshrink, "lambd"),
    _saves_input("Log", torch.log),
    _saves_input("Log2", torch.log2),
    _saves_input("Log10", torch.log10),
    _saves_input("Log1P", torch.log1p),
    _saves_input("Sin", torch.sin),
    _saves_input("Cos", torch.cos),
    _saves_input("Atan", torch.atan),
    _saves_input("Sinh", torch.sinh),
    _saves_input("Cosh", torch.cosh),
    _saves_input("Erf", torch.erf),
    Operation(
        "LogSigmoidBackward0",
        ELEMENTWISE,
        ("self",),
        _always(aten.log_sigmoid_forward),
        {"buffer": 1},
        by_sample=0,
    ),
    Operation("GluBackward0", PLAIN, ("self",), applying(torch.nn.functional.glu, "dim")),
    _saves_nothing("Sign", torch.sign),
    _saves_nothing("Floor", torch.floor),
    _saves_nothing("Ceil", torch.ceil),
    _saves_nothing("Round", torch.round),
    _saves_nothing("Trunc", torch.trunc),
)
