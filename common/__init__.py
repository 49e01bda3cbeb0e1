"""What the four scripts share. Nothing in here teaches a paper; each file can be read and copied by itself."""


class InputError(Exception):
    """Bad input of a user: one line that says what was found, what was expected and what to do.

    The scripts print it without a traceback and leave with exit code 2.
    """
