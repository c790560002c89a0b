"""A tiny phantom of each data set, in its exact layout: one module a data set, with `write(out, num_subjects, seed)`.

Every volume's values are a known function of place and time (`fields.py`), so what comes out of a set can be compared.
"""
