"""The one exception for people: its text is the whole message, and the command line exits with 2."""


class UserError(ValueError):
    """Something the user can mend: the message names the file, row or key, what is wrong, and the way out."""
