"""What we rely on of torch's private autograd: each function does what it says on the torch that is
installed."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from snn_revplugin.torch_internals import backward_pass, graph, saved_tensors, tensors, transforms


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


class TestPasses:
    def test_no_pass_outside_of_backward(self) -> None:
        assert backward_pass.current_pass() == backward_pass.NO_PASS
        parameter(2).sum().backward()
        assert backward_pass.current_pass() == backward_pass.NO_PASS

    def test_a_pass_has_one_number_and_the_next_another(self) -> None:
        x = parameter(2)
        y = x * 2
        z = y * 3
        for each in (y, z):
            each.register_hook(lambda _: seen.append(backward_pass.current_pass()))
        passes = []
        for _ in range(3):
            seen: list[int] = []
            z.sum().backward(retain_graph=True)
            assert len(seen) == 2 and seen[0] == seen[1] != backward_pass.NO_PASS
            passes.append(seen[0])
        assert len(set(passes)) == 3

    def test_the_node_under_way_and_its_age(self) -> None:
        class Looks(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                seen.append(backward_pass.current_node())
                return grad

        seen: list[Any] = []
        before = backward_pass.next_age()
        y = Looks.apply(parameter(2))
        after = backward_pass.next_age()
        assert before <= graph.age_of(y.grad_fn) < after
        y.sum().backward()
        assert seen == [y.grad_fn] and backward_pass.current_node() is None

    def test_a_pass_inside_a_pass_has_its_own_number(self) -> None:
        seen = []

        def hook(_: Tensor) -> None:
            seen.append(backward_pass.current_pass())
            with torch.enable_grad():
                inner = parameter(2)
                inner.register_hook(lambda _: seen.append(backward_pass.current_pass()))
                inner.sum().backward()
            seen.append(backward_pass.current_pass())

        x = parameter(2)
        x.register_hook(hook)
        x.sum().backward()
        before, inside, after = seen
        assert before == after != inside

    def test_passes_of_threads_have_their_own_numbers(self) -> None:
        seen, together = [], threading.Barrier(2)

        def hook(_: Tensor) -> None:
            together.wait(timeout=60)
            seen.append(backward_pass.current_pass())
            together.wait(timeout=60)

        def work() -> None:
            x = parameter(2)
            x.register_hook(hook)
            x.sum().backward()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(seen) == len(set(seen)) == 2

    @pytest.mark.parametrize(
        ("options", "keeps"),
        [
            ({}, False),
            ({"retain_graph": True}, True),
            ({"create_graph": True, "retain_graph": True}, True),
        ],
        ids=["plain", "retain_graph", "create_graph"],
    )
    def test_whether_the_graph_is_kept(self, options: dict[str, bool], keeps: bool) -> None:
        seen, x = [], parameter(2)
        y = x * 2
        y.register_hook(lambda _: seen.append(backward_pass.pass_keeps_graph()))
        torch.autograd.grad(y.sum(), x, **options)
        assert seen == [keeps]

    def test_a_callback_at_the_end(self) -> None:
        events, x = [], parameter(2)
        y = x * 2
        y.register_hook(lambda _: backward_pass.at_end_of_pass(lambda: events.append("end")))
        x.register_hook(lambda _: events.append("last node"))
        y.sum().backward()
        assert events == ["last node", "end"]

    def test_no_callback_after_an_exception(self) -> None:
        events, x = [], parameter(2)

        def fail(_: Tensor) -> None:
            raise KeyError("in backward")

        y = x * 2
        y.register_hook(lambda _: backward_pass.at_end_of_pass(lambda: events.append("end")))
        x.register_hook(fail)
        with pytest.raises(KeyError):
            y.sum().backward()
        assert events == []


class TestWhoElseIsAtWork:
    def test_saved_tensor_hooks(self) -> None:
        assert not saved_tensors.saved_tensor_hooks_active()
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            assert saved_tensors.saved_tensor_hooks_active()
        with save_on_cpu():
            assert saved_tensors.saved_tensor_hooks_active()
        with disable_saved_tensors_hooks("not here"):
            assert saved_tensors.saved_tensor_hooks_active()
        assert not saved_tensors.saved_tensor_hooks_active()

    def test_checkpoint(self) -> None:
        seen = []

        def function(x: Tensor) -> Tensor:
            seen.append(saved_tensors.saved_tensor_hooks_active())
            return x.sin()

        checkpoint(function, parameter(3), use_reentrant=False).sum().backward()
        assert seen == [True, True]  # in forward, and when it is recomputed

    def test_transforms(self) -> None:
        seen = []

        def function(x: Tensor) -> Tensor:
            seen.append(transforms.is_transformed())
            return (x * 2).sum()

        function(torch.ones(3))
        assert seen == [False]
        for transform in (
            torch.func.grad(function),
            torch.vmap(function),
            torch.func.functionalize(function),
        ):
            transform(torch.ones(2, 3))
        assert seen[1:] == [True] * 3
        function(torch.ones(3))
        assert seen[-1] is False

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
    def test_tracing(self) -> None:
        seen = []

        def function(x: Tensor) -> Tensor:
            seen.append(transforms.is_transformed())
            return x * 2

        torch.jit.trace(function, torch.ones(3), check_trace=False)
        assert seen == [True]

    def test_compiling(self) -> None:
        def function(x: Tensor) -> Tensor:
            return x + 1 if transforms.is_transformed() else x

        assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(())) == 1
        assert function(torch.zeros(())) == 0


class TestNodes:
    def test_names(self) -> None:
        x, w = parameter(2, 3, 8, 8), parameter(4, 3, 3, 3)
        node = F.conv2d(x, w).grad_fn
        assert graph.name_of(node) == "ConvolutionBackward0"
        assert graph.name_of(node.next_functions[0][0]) == "AccumulateGrad"

    def test_leaf_edges(self) -> None:
        x = parameter(3)
        node = x.exp().grad_fn
        assert not graph.is_leaf_edge(node)
        leaf = node.next_functions[0][0]
        assert graph.is_leaf_edge(leaf) and leaf.variable is x

    def test_attributes(self) -> None:
        node = F.conv2d(
            parameter(1, 4, 9, 9), parameter(4, 2, 3, 3), None, (2, 1), (0, 3), 2, 2
        ).grad_fn
        names = ("stride", "padding", "dilation", "groups", "transposed")
        assert [graph.attribute_of(node, name) for name in names] == [
            (2, 1),
            (0, 3),
            (2, 2),
            2,
            False,
        ]

    def test_negative_attributes(self) -> None:
        x = parameter(2, 3, 4)
        assert graph.attribute_of(x.sum((-1, -3)).grad_fn, "dim") == (-1, -3)
        assert graph.attribute_of(x.select(-1, -2).grad_fn, "dim") in (-1, 2)
        assert graph.attribute_of(x.transpose(-1, -2).grad_fn, "dim0") in (-1, 2)
        assert (
            x.detach()
            .select(2, graph.attribute_of(x.select(2, -1).grad_fn, "index"))
            .equal(x[..., -1])
        )

    def test_attributes_without_an_end(self) -> None:
        x = parameter(5)
        node = x[1:].grad_fn
        names = ("dim", "start", "end", "step")
        again = torch.ops.aten.slice.Tensor(
            x.detach(), *(graph.attribute_of(node, name) for name in names)
        )
        assert torch.equal(again, x[1:])

    def test_shape_and_type_of_outputs(self) -> None:
        x = parameter(2, 3, 4)
        assert tuple(graph.shape_of_output(x.view(6, 4).grad_fn)) == (6, 4)
        node = x.split([1, 2], dim=1)[0].grad_fn
        assert [tuple(graph.shape_of_output(node, i)) for i in range(2)] == [(2, 1, 4), (2, 2, 4)]
        assert graph.type_of_output(x.to(torch.bfloat16).grad_fn) == (
            torch.bfloat16,
            torch.device("cpu"),
        )


class TestSavedTensors:
    def test_what_a_node_saved(self) -> None:
        x, w = parameter(3), torch.ones(3)
        node = (x * w).grad_fn
        assert saved_tensors.saved_by(node, "other") is w
        assert (
            saved_tensors.saved_by(node, "self") is None
        )  # w asks for no gradient, so x is not needed

    def test_nothing_after_backward_freed_it(self) -> None:
        x = parameter(3)
        y = x * x
        y.sum().backward()
        assert saved_tensors.saved_by(y.grad_fn, "self") is None

    def test_nothing_after_it_was_changed_in_place(self) -> None:
        """That is autograd's error to raise, in backward."""
        x, w = parameter(3), torch.ones(3)
        y = x * w
        w.add_(1)
        assert saved_tensors.saved_by(y.grad_fn, "other") is None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_nothing_where_another_owner_unpacks_it(self) -> None:
        """To ask would make a checkpoint compute itself again in the middle of the forward pass."""
        unpacked = []
        with saved_tensors_hooks(lambda x: x, lambda x: unpacked.append(1) or x):
            y = parameter(3) * torch.ones(3)
        assert saved_tensors.saved_by(y.grad_fn, "other") is None
        assert unpacked == []

    def test_replacing(self) -> None:
        """Autograd lets go of the tensor at once and reads ours instead, each time it asks."""
        x, w, asked = parameter(3), torch.full((3,), 2.0), []
        memory = weakref.ref(w.untyped_storage())
        y = x * w
        del w

        def unpack() -> Tensor:
            asked.append(1)
            return torch.full((3,), 5.0)

        assert memory() is not None
        assert saved_tensors.replace_saved(y.grad_fn, "other", unpack)
        assert memory() is None and not asked
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 10.0)) and len(asked) == 2

    def test_replacing_what_somebody_else_has_replaced(self) -> None:
        x = parameter(3)
        y = x * torch.ones(3)
        assert saved_tensors.replace_saved(y.grad_fn, "other", lambda: torch.full((3,), 4.0))
        assert not saved_tensors.replace_saved(y.grad_fn, "other", lambda: torch.zeros(3))
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 4.0))

    def test_replacing_an_output(self) -> None:
        """What takes the place of a node's own output dies with the node."""

        class Recipe:
            def value(self) -> Tensor:
                return torch.ones(3)

        x, recipe = parameter(3), Recipe()
        remembered = weakref.ref(recipe)
        y = x.exp()
        assert saved_tensors.replace_saved(y.grad_fn, "result", recipe.value)
        del recipe
        y.sum().backward(retain_graph=True)
        assert torch.equal(x.grad, torch.ones(3)) and remembered() is not None
        del y
        assert remembered() is None

    def test_held_by_autograd_alone(self) -> None:
        x, mask, whole = parameter(3), torch.ones(3), torch.ones(2, 3)

        def alone(y: Tensor) -> bool:
            saved = saved_tensors.saved_by(y.grad_fn, "other")
            return saved_tensors.held_by_autograd_alone(saved, references=1)

        # Not inside of an assertion: pytest holds what it has seen there.
        products = [x * torch.ones(3), F.dropout(x, 0.5), x * mask, x * whole[0]]
        found = [alone(each) for each in products]
        assert found == [True, True, False, False]


class TestModes:
    def test_those_of_this_thread_from_the_outside_in(self) -> None:
        class Functions(TorchFunctionMode):
            pass

        outer, inner = (tensors.Watch(lambda _: None, lambda _: None) for _ in range(2))
        functions = Functions()
        assert transforms.modes_at_work() == []
        with outer, functions, inner:
            assert transforms.modes_at_work() == [outer, inner, functions]
            elsewhere: list[list] = []
            thread = threading.Thread(target=lambda: elsewhere.append(transforms.modes_at_work()))
            thread.start()
            thread.join()
        assert elsewhere == [[]]
        assert transforms.modes_at_work() == []


class TestWatching:
    def test_sees_what_is_read_and_given(self) -> None:
        read, given, x = [], [], torch.ones(3)
        with tensors.Watch(lambda tensors: read.append(len(tensors)), given.extend):
            y = x.mul(2)
            first, rest = y.split([1, 2])
            torch.cat([rest, first])
        assert read == [1, 1, 2]
        assert [tuple(each.shape) for each in given] == [(3,), (1,), (2,), (3,)]

    def test_sees_a_backward(self) -> None:
        given, x = [], parameter(3, 4)
        w = torch.ones(4, 2)
        with tensors.Watch(lambda _: None, given.extend):
            (x @ w).sum().backward()
        assert any(each.shape == x.shape for each in given)
        assert torch.equal(x.grad, torch.full((3, 4), 2.0))

    def test_memory_is_one_object(self) -> None:
        x = torch.ones(4)
        storage = tensors.storage_of(x)
        assert tensors.storage_of(x[1:].detach()) is storage
        memory = weakref.ref(storage)
        view = x[2:]
        del x, storage
        assert memory() is not None
        del view
        assert memory() is None

    def test_memory_of_a_sparse_tensor(self) -> None:
        assert tensors.storage_of(torch.eye(3).to_sparse()) is None


def test_nodes_with_slots() -> None:
    """Their attributes take no dict, and nothing else about them changes."""

    @graph.with_slots("note")
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.note = "noted"
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert ctx.note == "noted"
            return 2 * grad

    x = parameter(3)
    y = Twice.apply(x)
    assert graph.name_of(y.grad_fn) == "TwiceBackward"
    assert "note" not in y.grad_fn.__dict__
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
