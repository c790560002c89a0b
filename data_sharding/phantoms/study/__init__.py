"""A synthetic study of resting brains with a known truth: a BIDS derivatives folder of real NIfTI files.

Reading order: regions.py (where), population.py (the average brain), subject.py (the hidden truth), scans.py (the
physics), files.py and write.py (bytes on disk). It knows nothing of shards or models. Constants: docs/phantom.md.
"""

from .config import PhantomConfig, PhantomError
from .write import write_phantom

__all__ = ["PhantomConfig", "PhantomError", "write_phantom"]
