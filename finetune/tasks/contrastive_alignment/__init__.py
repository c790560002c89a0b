"""Align structure and function: find a subject's fMRI by its T1 among those of others, and the other way round."""
