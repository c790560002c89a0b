"""Raw scans -> transforms to a template: computed once with ANTs, stored, and plain arrays from then on.

Promise: a scan is aligned with a similarity that failures do not reach, or refused with the similarity it reached.
Brains are compared with brains: a scan or template that still has a skull is stripped first. Applying a transform is
`brain_models.preprocess`; nothing here is needed for it. All millimetres are RAS+ (right, front, up), as in NIfTI.

Reading order: register.py (the steps), template.py, matching.py (which start is best, how good is it), motion.py,
volumes.py, ants_calls.py. It knows nothing of shards.
"""
