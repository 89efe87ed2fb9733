"""The exceptions for people: the text is the whole message, and the command line exits with the code."""


class UserError(ValueError):
    """Something the user can mend: the message names the file, row or key, what is wrong, and the way out."""

    exit_code = 2
    local = False
    """Met by one process alone, so that this one has to say it."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The text of another library's error, cut to fit into a message of ours."""
    return " ".join(str(error).split())[:most]


class RowError(UserError):
    """One row is bad. `data.on_bad_row: skip` passes over it and counts it by its reason."""

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        """
        Args:
            where: file, row and message.
            reason: one of a finite number of texts, so that rows can be counted by it.
            detail: what this row holds, and the mend; follows the reason.
        """
        super().__init__(where, reason, detail)
        self.where, self.reason = where, reason
        self._text = f"{where}: {reason}{detail}"

    def __str__(self) -> str:
        return self._text


class SaveError(UserError):
    """Something could not be written: a full disk, a lost mount."""

    exit_code = 3


class NonFiniteError(UserError):
    """Too many steps in a row without a finite loss and gradient."""

    exit_code = 4


class DeviceMemoryError(UserError):
    """A pack does not fit the device's memory."""

    exit_code = 5
    local = True


class WorkerError(UserError):
    """A process that prepares data, or another process of the run, died."""

    exit_code = 6


class LostProcessError(WorkerError):
    """Another process of the run ended, so this one cannot go on; that one says why."""

    local = True
