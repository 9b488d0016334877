"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error that the user can fix: the message names the file, row or key, the value, and the next step.

    A stage that raises it ends with exit status 1 and this message alone, without a traceback.
    """
