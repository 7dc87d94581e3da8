"""Exit codes, and answers printed for people or, with `--json`, for programs."""

import json
from typing import Any

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell reports for SIGINT


def print_answer(value: Any, rendered: Any, as_json: bool) -> None:
    """Print `value` as JSON for a program, or `rendered` for a person."""
    if as_json:
        print_json(value)
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=isinstance(rendered, str))
    console.print(rendered, crop=False)  # never truncate: lines are copied and pasted


def print_json(value: Any) -> None:
    """Print a value as indented JSON; types that JSON does not have are printed as strings."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))
