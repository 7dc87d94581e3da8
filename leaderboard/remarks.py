"""Sections that are lists of sentences: problems, missing scores, verdicts and notes."""

from leaderboard.columns import PRETRAIN
from leaderboard.gallery import find_problems
from leaderboard.sections import Bullets, Results, Section
from leaderboard.wording import describe_failure
from mae_bench.record import NO_BACKBONE


def build_problems(results: Results) -> Section | None:
    """Return what could not be read, compared or shown."""
    problems = results.comparison.problems + find_problems(results.runs)
    return _build_list("Problems", problems, is_warning=True)


def build_failures(results: Results) -> Section | None:
    """Return every cell that failed or could not run, with its reason.

    A backbone that could not be made is reported once, not once more for each of its transfers.
    """
    failures = results.comparison.failures
    failed = {failure.backbone for failure in failures if failure.task == PRETRAIN}
    own = [
        lost for lost in failures if lost.backbone not in failed or not lost.reason.startswith(NO_BACKBONE)
    ]
    return _build_list("Missing scores", [describe_failure(lost) for lost in own])


def build_verdicts(results: Results) -> Section | None:
    """Return what each column shows, in one sentence per column."""
    return _build_list("Summary", results.comparison.verdicts)


def build_notes(results: Results) -> Section | None:
    """Return what to know about the intervals and the seeds."""
    return _build_list("Notes", results.comparison.notes)


def _build_list(title: str, items: list[str], is_warning: bool = False) -> Section | None:
    if not items:
        return None
    return Section(title, (Bullets(tuple(items)),), medium="terminal", is_warning=is_warning)
