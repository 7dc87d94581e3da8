"""`python -m mae_bench`: the command line, for launchers that start a module: torchrun ... -m mae_bench pretrain CONFIG."""

import runpy

runpy.run_module(
    "mae_bench.cli", run_name="__main__", alter_sys=True
)  # not an import: nobody imports the roof
