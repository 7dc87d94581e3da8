"""Generate the demo data of a suite in a process whose progress can be shown and which can be stopped."""

import json
import sys
from pathlib import Path

from mae_bench.config import build, expand_variables
from mae_bench.data.demo.demo import DemoConfig, make_demo_data
from mae_bench.errors import Interrupted, UserError
from mae_bench.files import write_json
from mae_bench.progress import EVENTS_FILE, Progress
from mae_bench.runner.worker import INTERRUPTED
from mae_bench.suite.config import SuiteConfig

FOLDER, ORDER_FILE = "demo_data", "order.json"


def ask_for_data(suite: SuiteConfig) -> Path:
    """Write the order for the data; return the argument of `python -m mae_bench.runner.demo_worker`."""
    root = suite.data.get("root")
    if not root or not suite.demo_data:
        raise UserError("demo_data without data.root", expected="data.root: the folder for the data")
    folder = Path(suite.out) / FOLDER
    write_json(folder / ORDER_FILE, {"root": root, "config": suite.demo_data.model_dump(mode="json")})
    return folder


def main() -> int:
    """Generate the data; exit code 0 done, 1 failed (the reason is printed), 75 stopped."""
    folder = Path(sys.argv[1])
    order = json.loads((folder / ORDER_FILE).read_text(encoding="utf-8"))
    progress = Progress(folder / EVENTS_FILE)
    progress.stop_on_signals()
    try:
        make_demo_data(
            Path(expand_variables(order["root"])), build(DemoConfig, order["config"], "demo_data"), progress
        )
    except Interrupted:
        return INTERRUPTED
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
