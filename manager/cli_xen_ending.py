"""How the programs for Xen's domains end: what went wrong on standard error, and an exit code."""

import sys
from collections.abc import Callable

from frontend_backend.messages_admin import ExitCode
from frontend_backend.xen_kernel import XenDeniedError, XenError, XenMissingError
from manager.errors import ManagerError
from manager.task_errors import expected_error


def exit_code_of(program: str, work: Callable[[], int]) -> int:
    """Do the work and return its exit code; of what was to be expected say what it was, as `program`."""
    try:
        return work()
    except (ManagerError, XenError) as error:
        return _failed(program, error)
    except BaseExceptionGroup as group:
        first = expected_error(group, (ManagerError, XenError))
        if first is None:
            raise
        return _failed(program, first)


def _failed(program: str, error: BaseException) -> int:
    print(f"{program}: {error}", file=sys.stderr)
    if isinstance(error, XenMissingError):
        return int(ExitCode.NOT_FOUND)
    if isinstance(error, XenDeniedError):
        return int(ExitCode.DENIED)
    return int(getattr(error, "code", ExitCode.FAILURE))
