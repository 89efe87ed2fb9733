"""The exceptions for people: the text is the whole message, and the command line exits with the code."""


class UserError(ValueError):
    """Something the user can mend: the message names the file, row or key, what is wrong, and the way out."""

    exit_code = 2
    local = False
    """Met by one process alone, so that this one has to say it."""


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
