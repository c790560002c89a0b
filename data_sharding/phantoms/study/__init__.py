"""A synthetic study of resting brains with a known truth: a BIDS derivatives folder of real NIfTI files.

Reading order: regions.py (where), population.py (the average brain), subject.py (the hidden truth), scans.py (the
physics), write.py (bytes on disk). It knows nothing of shards or models. Constants: docs/phantom.md.
"""
