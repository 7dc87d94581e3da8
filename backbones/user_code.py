"""Import and call the user's own code by MODULE:CALLABLE, and report any exception in one line."""

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

MAX_MESSAGE = 500  # characters of an exception's text that are shown


def load_callable(against: str) -> Callable[..., Any]:
    """Import MODULE, from the working folder or installed, and return its CALLABLE; UserError if it fails."""
    module_name, colon, name = against.partition(":")
    if not colon or not module_name or not name:
        raise UserError(
            f"--against {against}",
            expected="MODULE:CALLABLE, for example my_model:build for build() in my_model.py",
        )
    with _importing_from(Path.cwd()):
        _require(module_name.partition(".")[0])
        module = call_user_code(f"{module_name} cannot be imported", importlib.import_module, module_name)
    try:
        found: Callable[..., Any] = attrgetter(name)(module)
    except AttributeError as error:
        raise UserError(
            f"{module_name} has no {name}", expected="MODULE:CALLABLE", fix=did_you_mean(name, vars(module))
        ) from error
    if not callable(found):
        raise UserError(
            f"{against} is of type {type(found).__name__}",
            expected="a callable that returns a torch.nn.Module",
        )
    return found


def _require(module: str) -> None:
    """Raise UserError, with similarly named files of the working folder, if a module cannot be found."""
    if module in sys.modules or importlib.util.find_spec(module):
        return
    raise UserError(
        f"no module {module}",
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


def call_user_code(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call the user's own code; turn any exception into a UserError with its type, message and place."""
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as error:
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        raise UserError(f"{what}: {type(error).__name__}: {str(error)[:MAX_MESSAGE]}{place}") from error
