"""What pretraining refuses, as errors a user can act on."""

from brain_models.errors import UserError


class PretrainError(UserError):
    """A pretraining configuration or data set that cannot be used; the message says what, where and what to do."""


class MaskingError(PretrainError):
    """A masking arm that cannot hide what it is asked to hide."""
