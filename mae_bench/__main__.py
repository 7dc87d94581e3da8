"""Start the command line as `python -m mae_bench`, the form that torchrun needs."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python -m` puts the working folder first on the import path, where a tasks.py or backbones/ of the user
    # would hide a package of ours. Keep it only if it is the folder that contains this package.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parent.parent:
        del sys.path[0]

    from mae_bench.cli.app import main

    main()
