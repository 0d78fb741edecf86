"""Runs stock recipes one after the other: `python -m tests.parity.stock_launcher RECIPE CONFIG [RECIPE CONFIG ...]`.

Each runs the code of `tune run RECIPE --config CONFIG`, all in this process, because importing torchtune takes longer
than most of the runs. Under torchrun, which `tune run --nproc_per_node` starts, the process is one rank; it first makes
the changes that the distributed recipes need on a CPU.
"""

import os
import sys

from torchtune._cli import tune

from benchmarks.stock import join_on_cpu


def main() -> None:
    pairs = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    if "RANK" in os.environ:
        join_on_cpu()
    for recipe, config in pairs:
        sys.argv = ["tune", "run", recipe, "--config", config]
        try:
            tune.main()
        except SystemExit as end:  # recipes end with sys.exit(recipe_main())
            if end.code:
                raise


if __name__ == "__main__":
    main()
