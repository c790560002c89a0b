"""Errors a user of fine-tuning can act on."""


class FinetuneError(ValueError):
    """Says what cannot be fine-tuned or predicted, where, and what to do next."""
