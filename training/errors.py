"""What goes wrong while training: messages for the user, ending in what to do."""

from brain_models.errors import UserError


class TrainingError(UserError):
    """A run that cannot start or continue as configured."""


class StoppedError(TrainingError):
    """A run that was asked to stop and has saved; the same command resumes it."""

    exit_status = 75  # sysexits.h: a temporary failure, try again


class CheckpointError(UserError):
    """A checkpoint that is damaged, does not fit this run, or does not exist."""


class RegistryError(UserError):
    """A registered model that cannot be found or read."""
