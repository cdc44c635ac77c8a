"""Errors that a person sees, each with what to do about it, and the exit codes of the commands."""

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `spotguard`; the numbers from 64 on are those of sysexits.h."""

    OK = 0
    FAILED = 1  # an error nobody foresaw, or a drill whose promise did not hold
    USAGE = 2  # argparse's own
    UNAVAILABLE = 69  # a neighbour (owner store, peer agent, metadata service) cannot be reached
    CANNOT_CREATE = 73  # a file or directory cannot be written
    UNSUPPORTED = 76  # this machine lacks what SpotGuard needs (kernel, CRIU, memory-backed directory)
    CONFIG = 78


class SpotGuardError(Exception):
    """Base of the errors that end a command: says what is wrong and how to put it right.

    `remedy`: one sentence for the person who reads it, empty when there is nothing to be done.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  remedy: {self.remedy}" if self.remedy else message


class ConfigError(SpotGuardError):
    """The configuration cannot be used. `problems`: every one that was found, a line each."""

    exit_code = ExitCode.CONFIG

    def __init__(self, problems: Sequence[str], *, remedy: str = "") -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"configuration: {count}\n" + "\n".join(f"  - {p}" for p in self.problems), remedy=remedy)


class Unsupported(SpotGuardError):  # noqa: N818 - named after the finding
    """This machine lacks something that SpotGuard needs."""

    exit_code = ExitCode.UNSUPPORTED


class Unavailable(SpotGuardError):  # noqa: N818 - named after the finding
    """A neighbour cannot be reached; trying again later may help."""

    exit_code = ExitCode.UNAVAILABLE


class JournalDamaged(SpotGuardError):  # noqa: N818 - named after the finding
    """A journal has an unreadable line before its end: guessing who owns what is worse than not starting."""

    exit_code = ExitCode.FAILED


class JournalError(SpotGuardError):
    """The journal of migrations cannot be read or written: nothing dangerous is begun without it."""

    exit_code = ExitCode.CANNOT_CREATE


class LabError(SpotGuardError):
    """The drill's own set-up failed: no word about SpotGuard."""
