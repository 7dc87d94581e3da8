"""One model on several processes, replicated (DDP) or sharded (FSDP2), and compiled."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mae_bench.config import TrainConfig
from mae_bench.engine.distributed import world

# Devices whose LayerNorm accepts float32 inputs with bfloat16 weights under autocast; the CPU has no such
# kernel
NARROW_DEVICES = {"cuda"}


class Parallel:
    """A model prepared for the processes at hand.

    model: holds the parameters, under the names of the plain model.
    call: the module to call in training: compiled, wrapped or both.

    other_weights: whether `gather_model` will be called with other weights (an EMA).
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, device: torch.device, other_weights: bool = False
    ):
        compiles = config.compile if config.compile is not None else device.type == "cuda"
        sharded = world().size > 1 and config.parallel == "fsdp"
        self._shape = _copy_on_meta(model) if sharded or other_weights else None
        self.model = self.call = model
        if sharded:
            _shard(model, device, config.amp_dtype, compiles)
        elif world().size > 1:
            self.call = _replicate(model, device)
        self._wrapped = self.call
        if compiles and not sharded:
            self.call = torch.compile(self.call)  # type: ignore[assignment]

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Context of a micro-batch: gradients are only synchronised after the last one of a step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            with self._wrapped.no_sync():
                yield
        else:
            yield

    def gather_model(self, weights: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """Return a plain module with all weights on this process. Every process must call it.

        weights: a state_dict, sharded like the model; by default the model's own weights, in which case the
            result may be the model itself.
        """
        sharded = isinstance(self.model, FSDPModule)
        full = {name: gather_tensor(t) for name, t in (weights or self.model.state_dict()).items()}
        for name, _ in self.model.named_buffers():
            if name in full:  # statistics differ, as each process saw other images: use those of rank 0
                broadcast(full[name])
        if weights is None and not sharded:
            return self.model
        model = copy.deepcopy(self._shape)
        assert model is not None
        model.load_state_dict(full, assign=True)
        return model


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the Transformer blocks: the members of every list named `blocks` or `..._blocks`."""
    found: list[nn.Module] = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if name.endswith("blocks") and isinstance(child, nn.ModuleList | nn.Sequential):
                found += child
    return found


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with all its shards. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local shard, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def broadcast(tensor: torch.Tensor) -> None:
    """Copy the tensor of rank 0 to all processes, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


def _copy_on_meta(model: nn.Module) -> nn.Module:
    """Copy a model with its parameters on the meta device; buffers are kept, as some are in no state_dict."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(model, memo)


def _replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    # No static_graph: its first step cannot skip the synchronisation, and torch.compile could not split the
    # graph by buckets
    ids = [world().local_rank] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


def _shard(model: nn.Module, device: torch.device, amp_dtype: str, compiles: bool) -> None:
    """Shard each block separately, and the remaining parameters at the root.

    With amp_dtype "bfloat16" the weights of blocks are gathered in bfloat16, to which autocast would cast
    them anyway. Those of the root stay float32, and inputs are not cast: rounding would change the order of
    the noise and the pixels of the target.
    """
    mesh = init_device_mesh(device.type, (world().size,))
    dtype = torch.bfloat16 if amp_dtype == "bfloat16" and device.type in NARROW_DEVICES else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in find_blocks(model):
        if compiles:  # only the forward: hooks that gather and free weights stay outside the graph
            compiled: Any = torch.compile(block.forward)
            block.forward = compiled
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
