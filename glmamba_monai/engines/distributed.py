"""Training on several processes, as started by ``torchrun``."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class Process(NamedTuple):
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device


def join_process_group() -> Process:
    """Join the process group that ``torchrun`` describes: NCCL with one GPU a process, gloo without GPUs.

    May be called again; the group is joined once.

    Raises:
        RuntimeError: the process was not started by ``torchrun``.
    """
    if not dist.is_initialized():
        if "LOCAL_RANK" not in os.environ:
            raise RuntimeError(
                "multi_gpu_train.json needs torchrun: torchrun --standalone --nproc_per_node=N -m monai.bundle run "
                "training --config_file \"['bundle/configs/train.json','bundle/configs/multi_gpu_train.json']\""
            )
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return Process(dist.get_rank(), dist.get_world_size(), device)
