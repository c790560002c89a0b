"""What goes wrong where bytes live: a message for the user, ending in what to do."""


class StorageError(ValueError):
    """A location that cannot be read or written as asked."""
