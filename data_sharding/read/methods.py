"""What a paper's Methods say of a shard set: scans, alignment, preprocessing, atlases and splits, from its manifest.

Sentences cite by key (reports.methods).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from brain_models.atlas import AAL3_GROUPS, Atlas
from brain_models.recipe import UNITS_PER_SCALE
from configs.words import counted, listed, span
from data_sharding.read.shard_set import ShardSet
from data_sharding.splits import SPLITS, ReadingSplit, SplitConfig

NOUNS = {"bold": "BOLD run", "t1": "T1-weighted image", "parcels": "region series", "response": "response to an image"}
PLURALS = {"parcels": "region series", "response": "responses to images"}
LAYOUTS = {  # by kind of source
    "bids": "the Brain Imaging Data Structure [@bids]",
    "adhd200": "ADHD-200 [@adhd200]",
    "hcp_motor": "the Human Connectome Project's motor task [@hcp]",
    "mica_mics": "MICA-MICs [@mica_mics], which is the Brain Imaging Data Structure [@bids]",
    "algonauts2023": "the Algonauts 2023 challenge [@algonauts], responses of the Natural Scenes Dataset [@nsd]",
}
TEMPLATES = {"NLin6Asym": "@mni6", "2009": "@mni2009", "fsLR": "@fslr", "fsaverage": "@fsaverage"}  # how names begin
CONFOUNDS = {"motion24": "@friston", "compcor5": "@compcor", "36p": "@satterthwaite"}
REFUSALS = {  # by acceptance rule: what is refused
    "min_frames": "runs of fewer than {:g} frames",
    "min_coverage": "scans with less than {:.0%} of the space measured",
    "min_region_coverage": "scans with less than {:.0%} of any region measured",
    "min_tsnr": "runs with a temporal signal to noise below {:g}",
    "max_mean_fd_mm": "runs with a mean framewise displacement above {:g} mm",
    "max_censored_fraction": "runs with more than {:.0%} of their frames censored",
    "max_clipped_fraction": "runs with more than {:.2%} of their values clipped",
}


def set_methods(shard_set: ShardSet, kinds: Sequence[str], atlases: Iterable[Atlas]) -> str:
    """A paragraph about the scans of these kinds, of which the set holds some, and these atlases."""
    made = shard_set.manifest.preprocessing
    sentences = [
        *_scans(shard_set, kinds),
        _alignment(made, kinds),
        _space(shard_set),
        *(_cleaning(made) if "bold" in kinds else []),
        *_stored(made, kinds),
        *_refused(shard_set),
        *map(_atlas, atlases),
        _splits(shard_set, kinds),
    ]
    return " ".join(sentences)


def kinds_of(shard_set: ShardSet) -> list[str]:
    """The kinds of scans that a set holds."""
    return [kind for kind in NOUNS if kind in set(shard_set.quality.kind)]


def _scans(shard_set: ShardSet, kinds: Sequence[str]) -> Iterator[str]:
    held = listed([_held(shard_set.scans(kind), kind) for kind in kinds])
    yield f"The data set {shard_set.manifest.name} holds {held}."
    if shard_set.is_phantom:
        yield "It is a phantom: a program made the scans, and no person was scanned."
    source = shard_set.manifest.preprocessing["source"]["kind"]
    if source in LAYOUTS:
        yield f"The files were read in the layout of {LAYOUTS[source]}."


def _held(scans: pd.DataFrame, kind: str) -> str:
    """`24 BOLD runs of 24 subjects (24 sessions, 3 sites; repetition time 2 s; 48 frames per run)`."""
    sites = scans.site[scans.site.fillna("") != ""].nunique()
    details = [counted(len(scans[["subject", "session"]].drop_duplicates()), "session")]
    details += [counted(sites, "site")] if sites else []
    if kind in ("bold", "parcels"):
        times = span(scans.repetition_time_s)
        details = [", ".join(details), f"repetition time {times} s", f"{span(scans.num_frames)} frames per run"]
    noun = counted(len(scans), NOUNS[kind], PLURALS.get(kind))
    separator = "; " if kind in ("bold", "parcels") else ", "
    return f"{noun} of {counted(scans.subject.nunique(), 'subject')} ({separator.join(details)})"


def _template(name: str) -> str:
    """The template's name with its citation."""
    cited = next((key for begin, key in TEMPLATES.items() if name.startswith(begin)), None)
    return f"{name} [{cited}]" if cited else name


def _alignment(made: dict[str, Any], kinds: Sequence[str]) -> str:
    template, how = _template(made["space"]["template"]), made["registration"]
    if made["alignment"] == "fmriprep":
        return f"All scans had been preprocessed by fMRIPrep [@fmriprep], in its template {template}."
    if made["alignment"] == "given":
        given = f"as they were given, in the template {template}"
        if template == "none":
            given = "in the scanner's own orientation, centred on the head's centre of mass"
        return f"Scans were taken {given}; none was registered in this work."
    then = ", then by SyN [@syn]" if how["kind"] == "nonlinear" else ""
    said = (
        "Raw T1-weighted images were corrected for uneven brightness by N4 [@n4] and registered to the template "
        f"{_template(how['template_name'])} with ANTs [@ants] by twelve parameters{then}; the most similar of "
        f"{counted(how['num_starts'], 'start')} was kept, and a correlation with it below {how['min_similarity']:g} "
        "refused."
    )
    if "bold" in kinds:
        said += (
            " Every frame of a raw BOLD run was aligned rigidly to the run's middle frame [@baker], their mean rigidly "
            "to the T1-weighted image, and all transforms were applied in one resampling; susceptibility distortion "
            "was not corrected."
        )
    return said


def _space(shard_set: ShardSet) -> str:
    space, num = shard_set.manifest.preprocessing["space"], shard_set.manifest.space["num_voxels"]
    if "spacing_mm" not in space:
        return f"Values are those of {num:,} locations of the surface {_template(space['template'])}."
    if "edge_voxels" in space:
        return f"They were resampled to a cube of {space['edge_voxels']} x {space['spacing_mm']:g} mm along each edge."
    mask = "nilearn's MNI152 brain mask [@nilearn]" if space["mask"] == "mni152" else "a brain mask"
    return (
        f"Where grids differed, scans were resampled linearly, after Gaussian smoothing along axes in which the new "
        f"grid is coarser, to {num:,} voxels of {space['spacing_mm']:g} mm inside {mask}, widened by "
        f"{space['dilate_mm']:g} mm and joined by the voxels of the atlases."
    )


def _cleaning(made: dict[str, Any]) -> Iterator[str]:
    cleaning = made["cleaning"]
    if made["frames_dropped"]:
        yield f"{counted(made['frames_dropped'], 'frame')} before the steady state were dropped."
    taken = list(filter(None, [_confounds(cleaning["confounds"]), _drifts(cleaning)]))
    if taken:
        yield f"From every voxel, {listed(taken)} were regressed out, by the conventions of nilearn [@nilearn]."
    if cleaning["filter"] == "butterworth" and (band := _band(cleaning)):
        yield f"Series were filtered by a Butterworth filter of order 5, forwards and backwards ({band}) [@nilearn]."
    if not taken and cleaning["filter"] == "cosine":
        yield "No confound and no drift was regressed out."
    limits = []
    if cleaning["censor_above_fd_mm"] is not None:
        limits.append(f"a framewise displacement [@power] above {cleaning['censor_above_fd_mm']:g} mm")
    if cleaning["censor_above_std_dvars"] is not None:
        limits.append(f"standardised DVARS above {cleaning['censor_above_std_dvars']:g}")
    if limits:
        yield (
            f"Frames with {' or '.join(limits)} were censored where that is known "
            f"({counted(made['frames_censored'], 'frame')}); windows with more than "
            f"{made['max_censored_fraction']:.0%} of such frames were not used."
        )


def _confounds(names: Sequence[str]) -> str:
    """The regressed confounds, with the papers of those that have one."""
    marked = [f"{name} [{CONFOUNDS[name]}]" if name in CONFOUNDS else name for name in names]
    return f"the confounds {listed(marked)}" if marked else ""


def _drifts(cleaning: dict[str, Any]) -> str:
    """What is regressed out for slow drift."""
    if cleaning["filter"] != "cosine":
        return ""
    high = cleaning["high_pass_hz"]
    trend = "a linear trend" if cleaning["detrend"] else ""
    cosines = f"cosine drifts slower than {1 / high:.0f} s ({high:.4f} Hz)" if high else ""
    return " and ".join(filter(None, [cosines, trend]))


def _band(cleaning: dict[str, Any]) -> str:
    """The frequencies that a filter keeps."""
    high, low = cleaning["high_pass_hz"], cleaning["low_pass_hz"]
    kept = [f"above {high:g} Hz"] if high else []
    return listed([*kept, *([f"below {low:g} Hz"] if low else [])]) if high or low else ""


def _stored(made: dict[str, Any], kinds: Sequence[str]) -> Iterator[str]:
    if "bold" in kinds:
        steps = {"int8": f"as 8-bit integers in steps of 1/{UNITS_PER_SCALE}", "float16": "in half precision"}
        yield (
            "Every voxel's series was centred on its mean, divided by its robust deviation (1.4826 times the median "
            f"absolute deviation), clipped at 6 and stored {steps[made['storage']['bold_type']]}."
        )
    if "t1" in kinds:
        yield "T1-weighted images were standardised over their measured voxels and stored in half precision."


def _refused(shard_set: ShardSet) -> Iterator[str]:
    rules = shard_set.manifest.preprocessing["acceptance"]
    asked = [words.format(rules[name]) for name, words in REFUSALS.items() if rules[name] is not None]
    num = len(shard_set.manifest.refused)
    if asked:
        yield f"Refused were {listed(asked)}; in all, {counted(num, 'scan')} {'was' if num == 1 else 'were'} left out."


def _atlas(atlas: Atlas) -> str:
    regions = counted(len(atlas.names), "region")
    if atlas.name == "template":
        return (
            f"The atlas is a parcellation of nilearn's template grey matter [@nilearn] into {regions} around the "
            "centres of well-known regions: a stand-in, not an anatomical atlas."
        )
    if atlas.name == "aal3" or set(atlas.groups) == set(AAL3_GROUPS):
        return f"The atlas is AAL3 [@aal3], of which {regions} lie in this space."
    return f"The atlas is {atlas.name} ({regions})."


def _splits(shard_set: ShardSet, kinds: Sequence[str]) -> str:
    unit = "stimulus" if kinds[0] == "response" else "subject"
    scans = pd.concat([shard_set.scans(kind) for kind in kinds])
    sizes = scans.groupby("split")[unit].nunique()
    counts = {split: int(sizes[split]) for split in SPLITS if split in sizes}
    if list(counts) == ["train"]:
        return f"All {counted(counts['train'], unit, 'stimuli' if unit == 'stimulus' else None)} are for training."
    rule = shard_set.split_rule
    divided = listed([f"{count} for {_PURPOSES[split]}" for split, count in counts.items()])
    family = shard_set.manifest.splits["family_column"] if rule.family_column is None else rule.family_column
    together = f", families ({family}) staying together" if family else ""
    plural = "Stimuli" if unit == "stimulus" else "Subjects"
    return f"{plural} were divided into {divided}, {_rule(rule)}{together}; none is in two of them."


_PURPOSES = {"train": "training", "validation": "validation", "test": "testing"}


def _rule(rule: SplitConfig) -> str:
    """How the splits came about."""
    if isinstance(rule, ReadingSplit) and rule.rule == "fold":
        by = f", balanced by {listed(rule.stratify_columns)}" if rule.stratify_columns else ""
        return f"fold {rule.fold} of {rule.num_folds} being tested and the next one validated on{by} (seed {rule.seed})"
    if isinstance(rule, ReadingSplit) and rule.rule == "site":
        return f"the site {rule.left_out_site} being tested (seed {rule.seed})"
    if rule.rule == "file":
        return "as a given list has them"
    if rule.rule == "stratified":
        return f"in proportion by {listed(rule.stratify_columns)}, ordered by a hash of their names (seed {rule.seed})"
    return f"by a hash of their names (seed {rule.seed})"
