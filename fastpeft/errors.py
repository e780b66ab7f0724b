"""Errors that the user can fix. The command line shows the message and no traceback, and ends with `exit_code`."""

import errno
import os


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message; empty if there is none."""
    return next(iter(str(error).strip().splitlines()), "")


class UserError(ValueError):
    """Input that cannot be used as it is; the message names the input and the fix. Exit code 2."""

    exit_code = 2


class UnavailableError(UserError):
    """A model, dataset or service that cannot be reached or used. Exit code 3."""

    exit_code = 3


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def disk_error(error: BaseException) -> UserError | None:
    """The UserError for a disk that is full, over quota or read-only; None for any other error.

    Safetensors raises its own class, which names the system's error number only in its text.
    """
    number = error.errno if isinstance(error, OSError) else None
    found = next((one for one in _DISK if one == number or f"(os error {one})" in str(error)), None)
    if found is None:
        return None
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return UserError(
        f"{where}{os.strerror(found)}: nothing more can be written. Make room, or choose another --results-dir; a run "
        "goes on from its last checkpoint with `fastpeft train --resume --name NAME`"
    )
