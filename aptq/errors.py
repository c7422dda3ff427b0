"""The one error class that a user is meant to read."""


class AptqError(ValueError):
    """Something that the user can mend: the message says what came, what is allowed and what to do.

    The command line prints the message alone, without a traceback. Everything else that is raised is a bug.
    """
