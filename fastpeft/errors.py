"""The errors that are the user's to mend: shown as a message with an exit code, never a traceback."""

import errno
import os


def first_line(error: BaseException | str) -> str:
    """Of what an error says; empty where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


class UserError(ValueError):
    """Input that cannot be used as it is; the message names the input and the fix."""

    exit_code = 2


class UnavailableError(UserError):
    """A model or dataset that cannot be had."""

    exit_code = 3


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def disk_error(error: BaseException) -> UserError | None:
    """What to do about a disk that is full, over quota or read-only; None where the error is no such one.

    Safetensors has errors of its own, which name the system's only in their text.
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
