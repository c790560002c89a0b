"""Errors that a user can fix. Each message says what is wrong, where, and what to do next."""


class UserError(ValueError):
    """The root of them in every package; it is here because this package imports none of the others."""

    exit_status = 2  # of a command that ends with it


class ScanError(UserError):
    """A scan that cannot be read as what it is said to be."""


class SpaceError(UserError):
    """A brain space, atlas or patch layout that cannot be made or does not fit."""


class BundleError(UserError):
    """A bundle whose files, versions or golden output do not fit."""
