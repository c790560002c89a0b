"""What goes wrong where bytes live: a message for the user, ending in what to do."""

from brain_models.errors import UserError


class StorageError(UserError):
    """A location that cannot be read or written as asked."""


class StoreUnavailableError(StorageError):
    """The store did not answer, or not let us in: nothing is known about the object, so nothing is wrong with it."""


def is_final(error: BaseException) -> bool:
    """True for a user error that a restart would not cure; it may where a store is away or its keys have run out."""
    return isinstance(error, UserError) and not isinstance(error, StoreUnavailableError)


class ClusterError(UserError):
    """A cluster that does not answer, or has too little for the workers asked for."""


class SubmitError(UserError):
    """A command that cannot be handed to a cluster as given."""


class PreflightError(UserError):
    """A cluster on which this run would fail."""
