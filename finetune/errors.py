"""Errors a user of fine-tuning can act on."""

from brain_models.errors import UserError


class FinetuneError(UserError):
    """Says what cannot be fine-tuned or predicted, where, and what to do next."""
