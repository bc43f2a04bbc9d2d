"""Everything private that we use of torch.autograd, in one place.

Each name below is undocumented in torch or lives in ``torch._C``; when a torch release moves one, this is the only
file to mend. What the functions rely on is tested in ``tests/test_autograd_internals.py``.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

Node = Any  # torch.autograd.graph.Node, or None at the end of an edge
Edge = tuple[Node, int]  # the node that made a tensor, and which of its outputs the tensor was

NO_PASS = -1
TELLS_HOOKS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")  # not in torch 2.6
REPLACED = "snn_revplugin_replaced_"
RECOMPUTE = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 0}  # the mark of a traced node
Leaf = torch._C._functions.AccumulateGrad  # the node that accumulates a leaf's gradient; the leaf is its ``variable``
# Functions that give out what they were given: a module's backward hook, and FSDP's notice that it may reshard.
PASSING_ON = {"BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward"}


def with_slots(*names: str) -> Callable[[type[torch.autograd.Function]], type[torch.autograd.Function]]:
    """Let the graph nodes of a Function hold these attributes of ``ctx`` in slots. In a time loop there are two nodes a step,
    and the dict that an attribute takes otherwise is larger than the node."""

    def decorate(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        nodes = function._backward_cls
        function._backward_cls = type(nodes.__name__, (nodes,), {"__slots__": names})
        return function

    return decorate


def is_node_of(node: Node, function: type[torch.autograd.Function]) -> bool:
    """Whether a graph node stands for a call of ``function``."""
    return type(node) is function._backward_cls


def current_pass() -> int:
    """A number that identifies the backward pass under way in this thread; ``NO_PASS`` outside of one."""
    return torch._C._current_graph_task_id()


def pass_keeps_graph() -> bool:
    """Whether the backward pass under way was asked to keep its graph (``retain_graph`` or ``create_graph``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def will_run(node: Node) -> bool:
    """Whether the backward pass under way comes to ``node``."""
    return torch._C._will_engine_execute_node(node)


def at_end_of_pass(callback: Callable[[], None]) -> None:
    """Run ``callback`` when the backward pass under way has ended without an exception."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def saved_tensor_hooks_active() -> bool:
    """Whether someone (a checkpoint, ``save_on_cpu``) decides at present how autograd saves tensors."""
    return not torch._C._autograd._saved_tensors_hooks_is_enabled() or _default_hooks_are_set()


def _default_hooks_are_set() -> bool:
    if TELLS_HOOKS:
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    try:  # torch 2.6 forbids hooks as ever, but complains where there are some already
        torch._C._autograd._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        torch._C._autograd._saved_tensors_hooks_enable()
    return False


def is_transformed() -> bool:
    """Whether the code runs under torch.compile, tracing, vmap or another functorch transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def modes_at_work() -> list[Any]:
    """The ``TorchDispatchMode`` and ``TorchFunctionMode`` objects that see the operations of this thread: counters, say."""
    dispatch, functions = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    if not dispatch and not functions:  # nearly always, and asked at each time step
        return []
    modes = [torch._C._get_dispatch_stack_at(i) for i in range(dispatch)]
    return modes + [torch._C._get_function_stack_at(i) for i in range(functions)]


def is_transformed_while_compiling() -> bool:
    """Whether code that ``torch.compile`` traces runs under vmap or another functorch transform."""
    return torch._C._functorch.maybe_current_level() is not None


@contextmanager
def computed_again() -> Iterator[None]:
    """Whatever ``torch.compile`` traces inside is computed again in backward, not kept: the mark that ``checkpoint`` leaves on
    the nodes of a traced graph. Left to itself the partitioner keeps what a convolution's backward reads, however cheap."""
    meta = fx_traceback.current_meta
    before = {name: meta[name] for name in RECOMPUTE if name in meta}
    for name, value in RECOMPUTE.items():
        meta.setdefault(name, value)  # inside of a checkpoint, that one's
    try:
        yield
    finally:
        for name in RECOMPUTE:
            meta.pop(name, None)
        meta.update(before)


def name_of(node: Node) -> str:
    """The name of a graph node's operation: ``'ConvolutionBackward0'``."""
    return type(node).__name__


def is_leaf_edge(node: Node) -> bool:
    """Whether ``node`` accumulates the gradient of a leaf tensor, found as ``node.variable``."""
    return type(node) is Leaf


def leaves_of(tensor: Tensor) -> set[Tensor]:
    """The leaf tensors that a tensor has gradients for."""
    leaves, seen, nodes = set(), set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_leaf_edge(node):
            leaves.add(node.variable)
        nodes.extend(below for below, _ in node.next_functions)
    return leaves


def attribute_of(node: Node, name: str) -> Any:
    """What a node remembers of its operation: ``attribute_of(node, 'stride')``; a list as a tuple."""
    return plain(getattr(node, "_saved_" + name))


def attributes_of(*names: str) -> Callable[[Node], Any]:
    """A function that reads the named attributes of a node as they are, the one or a tuple of them: hashable, but see
    :func:`plain` for their values."""
    return attrgetter(*("_saved_" + name for name in names))


def plain(value: Any) -> Any:
    """The value of an attribute, whose negative numbers come as unsigned ones of 64 bits."""
    if type(value) is int:
        return value if value < 1 << 63 else value - (1 << 64)
    if type(value) is tuple or type(value) is list:
        return tuple(plain(each) for each in value)
    return value


def saved_by(node: Node, name: str) -> Tensor | None:
    """The tensor that ``node`` saved as ``name``, or None where it saved none or somebody's hook unpacks it."""
    try:
        if not TELLS_HOOKS:
            return _read_unless_hooked(node, "_saved_" + name)
        if getattr(getattr(node, "_raw_saved_" + name), "unpack_hook", None) is not None:
            return None  # asking would run it: a checkpoint would compute itself again in the middle of the forward
        return getattr(node, "_saved_" + name)
    except RuntimeError:  # freed, or changed in place since: autograd itself will say so in backward
        return None


def _read_unless_hooked(node: Node, attribute: str) -> Tensor | None:
    """A saved tensor, or None if a hook of Python code would have to run for it.

    Torch 2.6 does not say whether a saved tensor has hooks. So it is read while a profile function refuses every call of
    Python code; where somebody else profiles, it is not read at all.
    """
    if sys.getprofile() is not None:
        return None
    collects = gc.isenabled()
    gc.disable()  # or a finaliser's call could be refused
    sys.setprofile(_refuse_calls)
    try:
        return getattr(node, attribute)
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()


def _refuse_calls(frame: Any, event: str, argument: Any) -> None:
    called_here = frame.f_back is not None and frame.f_back.f_code is _read_unless_hooked.__code__
    if event == "call" and called_here and frame.f_code.co_name != "__torch_dispatch__":  # a dispatch mode sees the reading
        raise RuntimeError("a saved tensor has hooks")


def replace_saved(node: Node, name: str, unpack: Callable[[], Tensor]) -> bool:
    """Make autograd let go of a saved tensor now and call ``unpack`` when backward asks for it.

    Returns False where somebody else's hooks are set on it already.
    """
    _handing.unpack = unpack = unpack if TELLS_HOOKS else _Replacement(unpack)
    try:
        getattr(node, "_raw_saved_" + name).register_hooks(_hand_over, _call)
    except RuntimeError:
        return False
    if not TELLS_HOOKS:
        node.metadata[REPLACED + name] = weakref.ref(unpack)
    return True


def replacement_of(node: Node, name: str) -> Callable[[], Tensor] | None:
    """What :func:`replace_saved` put in the place of a saved tensor, or None if it did not."""
    if not TELLS_HOOKS:
        remembered = node.metadata.get(REPLACED + name)
        replacement = remembered and remembered()
        return replacement and replacement.unpack
    try:
        raw = getattr(node, "_raw_saved_" + name)
        return raw.data if getattr(raw, "unpack_hook", None) is _call else None
    except RuntimeError:  # freed
        return None


class _Replacement:
    """What torch 2.6, which does not say what a saved tensor's hooks hold, gives us to remember it by: as it lives in the hook
    alone, a weak reference to it dies when autograd lets go of the saved tensor."""

    __slots__ = ("__weakref__", "unpack")

    def __init__(self, unpack: Callable[[], Tensor]) -> None:
        self.unpack = unpack

    def __call__(self) -> Tensor:
        return self.unpack()


_handing = threading.local()  # what the next hook is to pack: a closure for each would stay with the graph as long as the hook


def _hand_over(_: Tensor) -> Callable[[], Tensor]:
    unpack, _handing.unpack = _handing.unpack, None
    return unpack


def _call(unpack: Callable[[], Tensor]) -> Tensor:
    return unpack()


def shape_of_output(node: Node, output: int = 0) -> Sequence[int]:
    """The shape of an output of a graph node's operation (a view does not save the shape it made)."""
    return node._input_metadata[output].shape


def type_of_output(node: Node, output: int = 0) -> tuple[torch.dtype, torch.device]:
    """dtype and device of an output of a graph node's operation."""
    metadata = node._input_metadata[output]
    return metadata.dtype, metadata.device


def wrapped_node(node: Node) -> Node:
    """The node of the operation that wrote into a view, from the ``CopySlices`` that stands for it; None where torch is too
    old to tell."""
    return getattr(node, "_wrapped_node", None)


def gradient_through(node: Node, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """What a node of one output makes of a gradient: one for each of its inputs. No hook runs, and nothing is freed."""
    with torch.no_grad():
        result = node(gradient)
    return result if isinstance(result, tuple) else (result,)


def held_by_autograd_alone(tensor: Tensor, references: int) -> bool:
    """Whether Python code knows no other reference to a saved tensor than the ``references`` of our own frames."""
    return sys.getrefcount(tensor) <= references + 1 + REFERENCES_OF_AUTOGRAD and not tensor._is_view()


def is_unseen(tensor: Tensor, references: int) -> bool:
    """Whether nobody has put a hook on the gradient of a saved tensor, or ever can; ``references`` as above."""
    return not tensor._backward_hooks and not tensor.retains_grad and held_by_autograd_alone(tensor, references + 1)


def _references_of_autograd() -> int:
    """What a saved tensor's count of references shows above those of Python code; it differs between torch releases."""
    with torch.enable_grad():
        product = torch.ones(1, requires_grad=True) * torch.ones(1)
        saved = product.grad_fn._saved_other
    return sys.getrefcount(saved) - 1


REFERENCES_OF_AUTOGRAD = _references_of_autograd()  # counted at import, where no mode is at work that holds tensors of its own


class Watch(TorchDispatchMode):
    """Calls back around every operation that runs inside a ``with`` block in this thread, those of a backward included.

    Args:
        before: called with the tensors that an operation is about to read.
        after: called with the tensors that it gave.
    """

    def __init__(self, before: Callable[[list[Tensor]], None], after: Callable[[list[Tensor]], None]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.before([each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)])
        result = func(*args, **kwargs)
        self.after([each for each in tree_leaves(result) if isinstance(each, Tensor)])
        return result


def is_overwritten_by_ddp(tensor: Tensor | None) -> bool:
    """Whether DistributedDataParallel may have written the first process's values into a tensor when the forward under way
    began. It does so with every buffer, a membrane potential among them, and sets the version back."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and any(each is tensor for each in active.modules_buffers)


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's memory has been given back behind its back, as FSDP does with weights between forward and backward:
    to read it would end the process."""
    storage = storage_of(tensor)
    return storage is not None and storage.nbytes() == 0 and tensor.numel() > 0


def weights_to_be_freed(node: Node) -> set[int]:
    """The storages, by ``id``, of the weights that FSDP frees when backward comes to ``node``, one of its notices; none if the
    forward of the module that they were sharded by is still under way, for then their backward surrounds what reads them."""
    group = getattr(node, "param_group", None)
    if group is None or group._training_state.name == "FORWARD":
        return set()
    weights = (getattr(each, "_unsharded_param", None) for each in group.fsdp_params)
    return {id(storage_of(each)) for each in weights if each is not None}


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor: one Python object for as long as the memory lives, whoever asks, so that it can be watched
    with a weak reference. None for a tensor without a storage of its own (a sparse one)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
