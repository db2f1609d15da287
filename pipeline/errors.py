"""The kinds of failure that a person reads, and the exit codes of every command and job.

`InputError` is the user's: it collects every problem found, one line each, and ends with exit code 2 before anything
is written. `FaultError` is the machine's: a lost peer, a hang, a broken device; the job may be run again (exit code
76). `DataError` is damaged data: a shard, its table or a sample is not what the index says (exit code 1).
`HealthError` is a model that does not learn as it should (exit code 1).
Everything else is a defect of ours and keeps its traceback.
"""

import difflib
import errno
from collections.abc import Iterable
from typing import Literal

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_STOPPED = 75  # stopped on request with a complete checkpoint: run me again (EX_TEMPFAIL)
EXIT_FAULT = 76  # infrastructure fault: the last verified checkpoint stands, run me again
MOST_NAMED = 40  # of what there is, in a line
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # an OSError of these is such a fault


class InputError(Exception):
    """Wrong input or configuration. `problems` holds one line per problem: file, path, value, rule, hint."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class FaultError(Exception):
    """An infrastructure fault: a peer lost, a hang verdict, a device error."""


class HealthError(Exception):
    """The model in training was in bad health for so long that its run was to stop; its checkpoint stands."""


class RefusedError(Exception):
    """What was made does not keep what it promises, and is thrown away: one line says why (exit code 1)."""


Cause = Literal["missing", "cut", "changed", "undecodable"]


class DataError(Exception):
    """A shard or its table is not what the index says: the message has the path, the sample, the fault, the remedy.

    `shard` is the name in the index and `key` the sample's, where they are known.
    """

    def __init__(self, message: str, *, cause: Cause, shard: str | None = None, key: str | None = None):
        super().__init__(message)
        self.cause, self.shard, self.key = cause, shard, key

    def __reduce__(self) -> tuple:
        return _data_error, (str(self), self.cause, self.shard, self.key)


def _data_error(message: str, cause: Cause, shard: str | None, key: str | None) -> DataError:
    return DataError(message, cause=cause, shard=shard, key=key)


def near_matches(name: str, known: Iterable[str]) -> str:
    """A hint that names what `name` may have meant, or what there is; empty when there is nothing to name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"`{match}`" for match in close) + "?"
    others = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    return f"there are: {', '.join(known[:MOST_NAMED])}{others}" if known else ""
