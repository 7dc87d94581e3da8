"""The command `list`: what is packaged, by the names that the other commands take."""

from enum import StrEnum
from typing import Annotated

import typer

from mae_bench.cli.options import Json
from mae_bench.cli.output import print_answer


class Listed(StrEnum):
    """What can be listed."""

    tasks = "tasks"
    suites = "suites"
    recipes = "recipes"
    models = "models"
    formats = "formats"


def list_(
    what: Annotated[Listed, typer.Argument(metavar="tasks|suites|recipes|models|formats")],
    as_json: Json = False,
) -> None:
    """List transfer tasks, suites, pretraining recipes, model sizes or checkpoint formats."""
    from mae_bench.suite import catalogue

    if what is Listed.formats:
        from backbones.translating.detect import FORMATS, WRITABLE

        rows = catalogue.describe_formats(FORMATS, WRITABLE)
    else:
        rows = catalogue.LISTS[what]()
    print_answer(rows, catalogue.render(rows), as_json)
