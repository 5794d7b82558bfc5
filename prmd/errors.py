"""The two errors a user can mend: a wrong configuration and wrong data.

Both are one line that says what, where, got, wanted and what to do; `utils.run_stage` prints that line and exits
with status 2. Every other exception keeps its traceback, because it is ours to mend.
"""


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
