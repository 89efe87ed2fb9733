"""The one exception for people: its text is the whole message, and the command line exits with 2."""


class UserError(ValueError):
    """Something the user can mend: the message names the file, row or key, what is wrong, and the way out."""


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
