"""The error that a user sees: what was given, what was expected, what to do next."""


class UserError(Exception):
    """A mistake that its user can mend; the command line prints it without a traceback and exits with 2.

    given: what was found, with its place (a path, a key, a value).
    expected: what would have been right.
    fix: the next thing to do, a command where there is one.
    """

    def __init__(self, given: str, *, expected: str = "", fix: str = ""):
        self.given, self.expected, self.fix = given, expected, fix
        parts = [given, expected and f"Expected: {expected}", fix and f"Next: {fix}"]
        super().__init__("\n".join(part for part in parts if part))


class NotInstalled(UserError):
    """An optional framework is missing: the cell is reported as 'not installed' with the command, and the rest runs."""


class Interrupted(Exception):
    """The job was asked to stop (SIGTERM, SIGINT, its parent gone); its state is saved and a second run goes on."""
