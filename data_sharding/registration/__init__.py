"""Raw scans -> transforms to a template: computed once with ANTs, stored, and plain arrays from then on.

Promise: a scan is aligned with a similarity that failures do not reach, or refused with the similarity it reached.
Brains are compared with brains: a scan or template that still has a skull is stripped first. Applying a transform is
`brain_models.preprocess`; nothing here is needed for it. All millimetres are RAS+ (right, front, up), as in NIfTI.

Reading order: structural.py and functional.py (the steps), template.py, matching.py (which start is best, how good is
it), skull.py, motion.py, volumes.py, ants_calls.py. It knows nothing of shards.
"""

from data_sharding.registration.ants_calls import RegistrationError, require_ants
from data_sharding.registration.config import RegistrationConfig, validate_registration
from data_sharding.registration.functional import register_bold
from data_sharding.registration.groups import ScanGroup, register_group
from data_sharding.registration.motion import Motion, estimate_motion
from data_sharding.registration.structural import register_t1

__all__ = [
    "Motion",
    "RegistrationConfig",
    "RegistrationError",
    "ScanGroup",
    "estimate_motion",
    "register_bold",
    "register_group",
    "register_t1",
    "require_ants",
    "validate_registration",
]
