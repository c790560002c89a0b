"""What goes wrong while training: messages for the user, ending in what to do."""


class TrainingError(ValueError):
    """A run that cannot start or go on as configured."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, does not fit this run, or does not exist."""


class RegistryError(ValueError):
    """A registered model that cannot be found or read."""
