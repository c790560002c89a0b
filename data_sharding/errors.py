"""What a user can mend about sources, shard sets and how they are read."""

from brain_models.errors import UserError


class SourceError(UserError):
    """A source of scans that cannot be used as it is."""


class ShardError(UserError):
    """A shard set that is missing, of another schema, damaged, or in the way of a new one."""


class SplitError(ShardError):
    """Subjects that cannot be split as asked."""
