"""What the first process of a container owes to others: it inherits all whose parents end, and must take them off."""

import contextlib
import os
from collections.abc import Collection

IS_INIT = os.getpid() == 1


def reap_orphans(own: Collection[int]) -> None:
    """Take off what has ended and was inherited; the codes of `own` children are left to who waits for them."""
    with contextlib.suppress(ChildProcessError):  # there is none at all
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in own:  # polled in a moment; whatever stands behind it is seen then
                return
            os.waitpid(ended.si_pid, 0)
