"""Checks in a process that is forked from the test's own."""

import os
import traceback
from collections.abc import Callable


def check_in_fork(check: Callable[[], None]) -> None:
    """Call `check` in a forked process; fails if it does."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
