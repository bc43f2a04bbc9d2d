"""What DistributedDataParallel and FSDP do to tensors behind autograd's back."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .graph import Node
from .tensors import storage_of

SHARDS = "torch.distributed"  # where torch defines the classes of such parameters


def is_overwritten_by_ddp(tensor: Tensor | None) -> bool:
    """Whether DistributedDataParallel may have written the first process's values into a tensor
    when the forward under way began. It does so with every buffer, a membrane potential among them,
    and sets the version back."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and any(each is tensor for each in active.modules_buffers)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module has parameters of which each process holds a part."""
    return any(type(each).__module__.startswith(SHARDS) for each in module.parameters())


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's memory has been given back behind its back, as FSDP does with weights
    between forward and backward: to read it would end the process."""
    storage = storage_of(tensor)
    return storage is not None and storage.nbytes() == 0 and tensor.numel() > 0


def weights_to_be_freed(node: Node) -> set[int]:
    """The storages, by ``id``, of the weights that FSDP frees when backward comes to ``node``, one
    of its notices; none if the forward of the module that they were sharded by is still under way,
    for then their backward surrounds what reads them."""
    group = getattr(node, "param_group", None)
    if group is None or group._training_state.name == "FORWARD":
        return set()
    weights = (getattr(each, "_unsharded_param", None) for each in group.fsdp_params)
    return {id(storage_of(each)) for each in weights if each is not None}
