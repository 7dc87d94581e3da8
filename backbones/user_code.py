"""The user's own code, by MODULE:CALLABLE: imported and run; whatever it raises is told in a line."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from mae_bench.errors import UserError, did_you_mean

MESSAGE = 500  # characters of an exception's text that are shown


def callable_named(against: str) -> Callable[..., Any]:
    """CALLABLE of MODULE, which is imported: from the working folder, or installed. UserError where it cannot be had."""
    module, colon, name = against.partition(":")
    if not colon or not module or not name:
        raise UserError(
            f"--against {against}",
            expected="MODULE:CALLABLE, for example my_model:build for build() in my_model.py",
        )
    with _importing_from(Path.cwd()):
        _require(module.partition(".")[0])
        made = run_theirs(f"{module} cannot be imported", importlib.import_module, module)
    try:
        found = attrgetter(name)(made)
    except AttributeError as error:
        raise UserError(
            f"{module} has no {name}", expected="MODULE:CALLABLE", fix=did_you_mean(name, vars(made))
        ) from error
    if not callable(found):
        raise UserError(
            f"{against} is of the type {type(found).__name__}",
            expected="a callable that returns a torch.nn.Module",
        )
    return found  # type: ignore[no-any-return]


def _require(module: str) -> None:
    """UserError for a module that is nowhere, with the files here that are spelled like it."""
    if module in sys.modules or importlib.util.find_spec(module):
        return
    raise UserError(
        f"there is no module {module}",
        expected=f"{module}.py in this folder, or an installed module",
        fix=did_you_mean(module, [path.stem for path in Path.cwd().glob("*.py")]),
    )


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def run_theirs(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Runs the user's own code: whatever it raises is told in a line, with the place."""
    try:
        return call(*arguments)
    except UserError:
        raise
    except Exception as error:
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        raise UserError(f"{what}: {type(error).__name__}: {str(error)[:MESSAGE]}{place}") from error
