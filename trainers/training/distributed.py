"""This process as a rank of a run: its device, sums over the ranks, and sharded tensors. A single process is rank 0 of
1."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container sees the memory limit of its cgroup (v2 and v1), in bytes. They are where Ray looks, too."""


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls) -> "Ranks":
        """The rank in torch.distributed's process group if that is initialised; otherwise a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), _device("nccl" in dist.get_backend()))
        return cls(0, 1, _device(torch.cuda.is_available()))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all ranks. Every rank gets the same bits."""
        if self.world == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return [float(total) for total in totals.tolist()]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds `tensor` up over all ranks, in place, without waiting for the device. Every rank gets the same bits."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all_(self, tensors: Sequence[Tensor]) -> None:
        """`sum_` of many tensors of one dtype, in one call, added up in at least float32."""
        if self.world > 1 and tensors:
            wide = torch.promote_types(tensors[0].dtype, torch.float32)
            together = self.sum_(torch.cat([tensor.flatten().to(wide) for tensor in tensors]))
            for tensor, total in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def memory_bytes(self) -> int:
        """Memory of the device; on the CPU this worker's share of the machine's or the container's."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return _host_memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def _host_memory_bytes() -> int:
    """Memory of the machine, or of this container if that is less."""
    limits = (path.read_text(encoding="ascii").strip() for path in MEMORY_LIMITS if path.exists())
    return min([int(psutil.virtual_memory().total), *(int(limit) for limit in limits if limit != "max")])


def _device(cuda: bool) -> torch.device:
    if not cuda:
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    index = local if local < torch.cuda.device_count() else torch.cuda.current_device()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def local(tensor: Tensor) -> Tensor:
    """The tensor, or this rank's shard of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor, ranks: Ranks) -> Tensor | None:
    """The full tensor, on the CPU, of one that may be sharded; None on ranks other than 0. Every rank has to call
    it."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        sharded = tensor.to(ranks.device)  # nccl can't gather shards that are offloaded to host memory
        tensor = cast(DTensor, sharded).full_tensor()
    return tensor.cpu() if ranks.first else None


def like(full: Tensor, parameter: Tensor, device: torch.device | None = None) -> Tensor:
    """`full` sharded as `parameter` is, on `device` (None: the parameter's). Every rank has to call it, with the same
    tensor."""
    if not isinstance(parameter, DTensor):
        return full.to(device or parameter.device)
    mesh = parameter.device_mesh
    # src_data_rank None: every rank has the whole tensor, so none has to send it.
    sharded = distribute_tensor(full.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    return sharded.to(device or parameter.to_local().device)
