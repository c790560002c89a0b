"""Errors of pretraining that a user can fix."""

from brain_models.errors import UserError


class PretrainError(UserError):
    """A pretraining configuration or data set that cannot be used; the message says what, where and what to do."""


class MaskingError(PretrainError):
    """A masking configuration that cannot hide as many tokens as it asks for."""
