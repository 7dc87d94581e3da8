"""Run a module in a process that ends with its parent: `python -m mae_bench.runner.child PARENT MODULE`."""

import runpy
import signal
import sys

from mae_bench.lifetime import bind_forks, end_with_parent


def main() -> None:
    """Run MODULE, with the arguments behind it, once this process is bound to PARENT, the pid of its parent.

    The module receives SIGTERM when the parent ends, and may save its state (`Progress.stop_on_signals`).
    """
    _, parent, module, *arguments = sys.argv
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may be ignored by inheritance
    end_with_parent(int(parent), signal.SIGTERM)
    bind_forks()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
