"""The errors that are the user's to mend: shown as a message with an exit code, never a traceback."""


def first_line(error: BaseException | str) -> str:
    """Of what an error says; empty where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


class UserError(ValueError):
    """Input that cannot be used as it is; the message names the input and the fix."""

    exit_code = 2


class UnavailableError(UserError):
    """A model or dataset that cannot be had."""

    exit_code = 3
