"""Runs stock recipes one after the other: `python -m tests.parity.stock_launcher RECIPE CONFIG [RECIPE CONFIG ...]`.

Each goes through the code of `tune run RECIPE --config CONFIG`, in this one process because importing torchtune takes
longer than most of the runs. Under torchrun, which is what `tune run --nproc_per_node` starts, the process is one
rank, and the three patches that the distributed recipes need on a CPU are made first.
"""

import gc
import os
import sys
from typing import Any

import torch.distributed as dist
from torchtune import training
from torchtune._cli import tune


def main() -> None:
    pairs = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    if "RANK" in os.environ:
        _patch_for_cpu_ranks()
    for recipe, config in pairs:
        sys.argv = ["tune", "run", recipe, "--config", config]
        try:
            tune.main()
        except SystemExit as end:  # recipes end with sys.exit(recipe_main())
            if end.code:
                raise


def _patch_for_cpu_ranks() -> None:
    # The LoRA recipe asks for "cuda:nccl,cpu:gloo", which a build of torch without CUDA doesn't have. One gloo group
    # serves all runs of this process: a second one could not meet at the same address.
    dist.init_process_group("gloo")
    dist.init_process_group = _nothing
    dist.destroy_process_group = _nothing
    # Both recipes report the accelerator's memory, and empty its cache, whatever device they run on.
    training.get_memory_stats = _no_memory_stats
    training.log_memory_stats = _nothing
    training.cleanup_before_training = gc.collect


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _no_memory_stats(*_: Any, **__: Any) -> dict[str, float]:
    return {}


if __name__ == "__main__":
    main()
