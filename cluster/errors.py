"""What goes wrong where bytes live: a message for the user, ending in what to do."""


class StorageError(ValueError):
    """A location that cannot be read or written as asked."""


class StoreUnavailableError(StorageError):
    """The store did not answer, or not let us in: nothing is known about the object, so nothing is wrong with it."""


class ClusterError(ValueError):
    """A cluster that does not answer, or has too little for the workers asked for."""


class SubmitError(ValueError):
    """A command that cannot be handed to a cluster as given."""


class PreflightError(ValueError):
    """A cluster on which this run would fail."""
