"""What went wrong, as the error that its request or the whole engine ends with."""

from __future__ import annotations

from lmdeploy.engine.plan import DEAD_MASK, NO_MEMORY, NON_FINITE, PROCESSOR_FAILED
from lmdeploy.errors import EngineDead, RequestError


def contained(cause: BaseException) -> RequestError:
    """An exception in the host's work for one request: that request fails, and no other."""
    return RequestError('LMD-337', cause=f'{type(cause).__name__}: {cause}')


def fatal(cause: BaseException) -> EngineDead:
    """An exception after which the device's state is unknown: every request fails."""
    return cause if isinstance(cause, EngineDead) else EngineDead('LMD-338', cause=f'{type(cause).__name__}: {cause}')


def bad_row(status: int, position: int, cause: str) -> RequestError:
    """A row's status that is not OK, after ``position`` tokens of its request."""
    if status == NON_FINITE:
        return RequestError('LMD-334', position=position)
    if status == DEAD_MASK:
        return RequestError('LMD-335', position=position)
    if status == NO_MEMORY:
        return RequestError('LMD-207', cause=cause)
    assert status == PROCESSOR_FAILED, f'unknown status {status}'
    return RequestError('LMD-336', position=position, cause=cause)
