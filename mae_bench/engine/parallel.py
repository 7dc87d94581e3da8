"""One model on several processes, as copies (DDP) or as shards (FSDP2): what to call, when gradients meet, the whole weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mae_bench.config import TrainConfig
from mae_bench.engine.distributed import world

NARROW_DEVICES = {
    "cuda"
}  # where autocast lets a LayerNorm with bfloat16 weights have float32 inputs; the CPU's has no such kernel


class Parallel:
    """`model` holds the parameters, under the names of the plain model; `call` is what computes: compiled, wrapped or both.

    other_weights: whether `whole` will be asked for others than the model's own (an average of them).
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, device: torch.device, other_weights: bool = False
    ):
        compiles = config.compile if config.compile is not None else device.type == "cuda"
        sharded = world().size > 1 and config.parallel == "fsdp"
        self._shape = _without_weights(model) if sharded or other_weights else None
        self.model = self.call = model
        if sharded:
            _shard(model, device, config.amp_dtype, compiles)
        elif world().size > 1:
            self.call = _copies(model, device)
        self._wrapped = self.call
        if compiles and not sharded:
            self.call = torch.compile(self.call)  # type: ignore[assignment]

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around a micro-batch: gradients meet the other processes' after the last one alone."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            with self._wrapped.no_sync():
                yield
        else:
            yield

    def whole(self, weights: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """A plain module with all of the weights on this process; every process must call it.

        weights: a state_dict, sharded as the model is; None for the model's own, which may then be the model itself.
        """
        sharded = isinstance(self.model, FSDPModule)
        full = {name: whole_tensor(tensor) for name, tensor in (weights or self.model.state_dict()).items()}
        for name, _ in self.model.named_buffers():
            if name in full:  # each process has seen its own images: the statistics of the first count
                broadcast(full[name])
        if weights is None and not sharded:
            return self.model
        model = copy.deepcopy(self._shape)
        assert model is not None
        model.load_state_dict(full, assign=True)
        return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The Transformer blocks: the members of every list that is called `blocks` or `..._blocks`."""
    lists = [
        child
        for parent in model.modules()
        for name, child in parent.named_children()
        if name.endswith("blocks")
    ]
    return [
        block for blocks in lists if isinstance(blocks, nn.ModuleList | nn.Sequential) for block in blocks
    ]


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The shard that is here, or the whole of what is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def broadcast(tensor: torch.Tensor) -> None:
    """Makes the first process's tensor everyone's, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are shapes alone, but whose buffers are real: some are in no state_dict."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]


def _copies(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    # No static_graph: its first step cannot skip the synchronisation, and torch.compile could not split the graph by buckets.
    ids = [world().local_rank] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


def _shard(model: nn.Module, device: torch.device, amp_dtype: str, compiles: bool) -> None:
    """Shards each block by itself and what is left at the root.

    In bfloat16 the blocks' weights travel as such, which is what autocast makes of them; the root's stay float32, and inputs are
    not cast: the order of the noise and the pixels of the target must not be rounded.
    """
    mesh = init_device_mesh(device.type, (world().size,))
    dtype = torch.bfloat16 if amp_dtype == "bfloat16" and device.type in NARROW_DEVICES else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        if compiles:  # the forward alone: the hooks that gather and free weights stay outside of the graph
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
