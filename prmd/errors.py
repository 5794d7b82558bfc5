"""What a user can mend: a wrong configuration, wrong data, and a disk that is full or may not be written.

All are one line that says what, where, got, wanted and what to do; `utils.run_stage` prints that line and exits
with status 2. Every other exception keeps its traceback, because it is ours to mend.
"""

import errno


class UserError(Exception):
    """Something the user can put right; the message is one clear line."""


class ConfigError(UserError):
    """A configuration, command line or set-up that cannot work."""


class StoppedError(Exception):
    """The user stopped a training that goes on where it was; the message says how.

    Attributes:
        status: what the process exits with.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class DataError(UserError):
    """A row, file or artifact that is missing, malformed or does not belong here."""


class NotFiniteError(DataError):
    """NaN or infinity in a model's weights, or in what is computed with it; the message names the model, or the rows."""


_ROOM = "make room, or set artifact_root to a folder on a larger disk; what is finished is kept"
_RIGHTS = "give this account the right to it, or set artifact_root to a folder you can write to"
_IN_THE_WAY = "a file lies where a folder is wanted, or a folder where a file is; move it away"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    getattr(errno, "EDQUOT", errno.ENOSPC): _ROOM,  # absent from some systems
    errno.EFBIG: "raise the size that a file may have here (ulimit -f, or the file system's own), or set another artifact_root",
    errno.EIO: "see whether the disk is full, over its quota or failing, or set another artifact_root",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENAMETOOLONG: "choose a shorter artifact_root, run_name or file name",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
}
"""What to do about each error of a disk; other errors of the system are no user's to mend."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, for a message: its first line, at most 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def user_line(error: BaseException) -> str:
    """The line of an error that a user can mend; empty where it is none."""
    if isinstance(error, UserError):
        return str(error)
    remedy = _REMEDIES.get(getattr(error, "errno", None) or 0) if isinstance(error, OSError) else None
    if remedy is None:
        return ""
    where = error.filename if error.filename is not None else "a file that a library writes"
    return f"{where}: {error.strerror}; {remedy}"
