"""Send the log, warnings and prints of a framework to a file of the job instead of the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path


@contextmanager
def log_to(path: Path, *names: str) -> Iterator[None]:
    """Append prints, warnings, our own log and the named loggers to `path` inside the `with` block."""
    with open(path, "a", encoding="utf-8", buffering=1) as file, redirect_stdout(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        loggers = [logging.getLogger(name) for name in ("mae_bench", "py.warnings", *names)]
        before = [(logger.level, logger.propagate) for logger in loggers]
        logging.captureWarnings(True)
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for logger, (level, propagate) in zip(loggers, before, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
                logger.propagate = propagate
