"""Start the command line as `python -m mae_bench`, the form that torchrun needs (torchrun ... -m mae_bench pretrain)."""

from mae_bench.cli.app import main

if __name__ == "__main__":
    main()
