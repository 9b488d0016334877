"""The one kind of error that is meant for the user's eyes."""


class UserError(Exception):
    """An error that the user can fix: the message names the file, row or key, the value, and what to do next.

    A stage that raises it ends with exit status 1 and this message alone, without a traceback.
    """
