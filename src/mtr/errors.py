"""Errors that a user can act on: the text is the complete message, and the command line exits with the code."""


class UserError(ValueError):
    """Something the user can fix: the message names the file, row or key, what is wrong, and what to do."""

    exit_code = 2
    local = False
    """Only one process of a run meets it, so that process has to report it."""
    key = ""
    """Of the recipe, what the error is about, where the message does not begin with it."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The text of another library's error, shortened to fit into a message of ours."""
    return " ".join(str(error)[: 10 * most].split())[:most]  # of a text of any size


def described(error: BaseException, most: int = 300) -> str:
    """As `one_line`, after the kind of error where the text alone (`'metadata'`) would not say what it is."""
    text = one_line(error, most)
    return text if text and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, rather than this process being told to end. A panic of Rust code, such as that of
    tokenizers, is no Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class RowError(UserError):
    """One row is bad. With `data.on_bad_row: skip` it is skipped and counted by its reason."""

    sha256: str | None = None
    """Of the row's text, where that could not be read."""

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        """
        Args:
            where: file, row and message.
            reason: one of a fixed set of texts, by which rows are counted.
            detail: what this row contains, and how to fix it; follows the reason.
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
    """A pack does not fit in the device's memory."""

    exit_code = 5
    local = True


class WorkerError(UserError):
    """A data worker or another process of the run died."""

    exit_code = 6


class LostProcessError(WorkerError):
    """Another process of the run ended, so this one cannot continue; that one reports why."""

    local = True


class UploadError(UserError):
    """The result is complete on disk, but could not be uploaded."""

    exit_code = 7
