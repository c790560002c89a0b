"""Errors a user can mend. Each message says what, where and what to do next."""


class ScanError(ValueError):
    """A scan that cannot be read as what it is said to be."""


class SpaceError(ValueError):
    """A brain space, atlas or patch layout that cannot be made or does not fit."""


class BundleError(ValueError):
    """A bundle whose files, versions or golden output do not fit."""
