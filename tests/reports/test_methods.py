"""The Methods text has the words and numbers of the run, and references for what it cites and nothing else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from torch import nn

from brain_models.encoder import EncoderConfig
from configs.entry import compose
from configs.parse import parse
from data_sharding.read.methods import set_methods
from data_sharding.splits import ReadingSplit, SplitConfig
from finetune.config import FinetuneConfig
from finetune.tasks import parse_task
from finetune.tasks.subject_prediction.config import Config
from finetune.tasks.subject_prediction.methods import prediction_methods
from finetune.tasks.subject_prediction.scores import CLASS_METRICS, VALUE_METRICS
from pretrain.masked.config import PretrainConfig
from pretrain.masked.methods import pretraining_methods
from reports.methods import MARK, REFERENCES, Methods, keys_of, methods
from tests.helpers_scans import NO_CLEANING, sharding_config
from tests.phantom_spaces import ball

ROOT = Path(__file__).parents[2]
GEOMETRY = ball(patch_voxels=3)


def authors(found: Methods) -> set[str]:
    """The first words of the references."""
    return {reference.split(" ")[0] for reference in found.references}


def scans_of(kind: str) -> pd.DataFrame:
    """Nine subjects of two sites, a session each, the first with two; six train, one validates, two are tested."""
    subjects = [f"s{number}" for number in range(9)]
    rows = [(subject, "1") for subject in subjects] + [("s0", "2")]
    frame = pd.DataFrame(rows, columns=["subject", "session"])
    frame["site"] = ["north" if int(subject[1]) % 2 else "south" for subject in frame.subject]
    frame["split"] = ["train" if int(s[1]) < 6 else "validation" if s == "s6" else "test" for s in frame.subject]
    frame["repetition_time_s"] = [0.0 if kind == "t1" else 2.25 if site == "north" else 1.5 for site in frame.site]
    return frame.assign(num_frames=150 if kind == "bold" else 1)


def made_up_set(*, alignment: str = "given", rule: SplitConfig | None = None, **changed: Any) -> Any:
    """What the text reads of an opened set; `changed` entries replace those of the manifest's preprocessing."""
    config = sharding_config(Path("scans"), Path("set"))
    preprocessing = {
        "space": dataclasses.asdict(config.space),
        "storage": dataclasses.asdict(config.storage),
        "cleaning": dataclasses.asdict(NO_CLEANING),
        "acceptance": dataclasses.asdict(config.acceptance),
        "alignment": alignment,
        "registration": None,
        "source": {"kind": "bids"},
        "max_censored_fraction": 0.2,
        "frames_dropped": 0,
        "frames_censored": 7,
    }
    manifest = SimpleNamespace(
        name="made-up",
        preprocessing=preprocessing | changed,
        space={"num_voxels": 1234},
        refused=["one", "two", "three"],
        splits={"family_column": None},
    )
    return SimpleNamespace(
        manifest=manifest,
        is_phantom=False,
        scans=scans_of,
        split_rule=rule or SplitConfig("stratified", 17, None, None, 1, 2, None, ["site"], None),
        atlases={"octants": GEOMETRY.atlas},
    )


def of_set(*kinds: str, **changed: Any) -> Methods:
    return methods([set_methods(made_up_set(**changed), kinds, [])])


def test_every_work_that_the_code_cites_has_a_reference_and_every_reference_is_cited() -> None:
    packages = ("data_sharding", "training", "pretrain", "finetune")
    text = "".join(path.read_text() for package in packages for path in (ROOT / package).rglob("methods.py"))
    cited = {key for part in re.findall(r"@\w+(?:; @\w+)*", text) for key in keys_of(part)}
    assert cited == set(REFERENCES)
    for short, whole in REFERENCES.values():
        assert re.search(r"\d{4}", short)[0] in whole  # type: ignore[index]
        assert whole.startswith(short.split(" ")[0].rstrip(",")) or short.startswith("ADHD-200"), short


def test_marks_become_names_and_exactly_the_cited_references_are_listed_by_author() -> None:
    found = methods(["Trained [@mae; @videomae].", "Registered [@ants], as before [@mae]."])
    assert found.paragraphs == [
        "Trained (He et al., 2022; Tong et al., 2022).",
        "Registered (Avants et al., 2011), as before (He et al., 2022).",
    ]
    assert [reference.split(" ")[0] for reference in found.references] == ["Avants", "He", "Tong"]
    with pytest.raises(KeyError, match="nobody"):
        methods(["Said [@nobody]."])


def test_a_set_as_given_says_its_scans_storage_refusals_and_splits_and_cites_no_tool() -> None:
    found = of_set("bold", "t1")
    (text,) = found.paragraphs
    for said in (
        "made-up holds 10 BOLD runs of 9 subjects (10 sessions, 2 sites; repetition time 1.5 to 2.25 s; 150 frames",
        "and 10 T1-weighted images of 9 subjects (10 sessions, 2 sites)",
        "taken as they were given, in the template NLin6Asym",
        "to 1,234 voxels of 12 mm inside nilearn's MNI152 brain mask",
        "No confound and no drift was regressed out.",
        "above 0.5 mm were censored where that is known (7 frames)",
        "windows with more than 20% of such frames",
        "8-bit integers in steps of 1/21",
        "runs of fewer than 4 frames and scans with less than 50% of the space measured; in all, 3 scans were left out",
        "6 for training, 1 for validation and 2 for testing, in proportion by site",
        "(seed 17)",
    ):
        assert said in text, said
    assert "phantom" not in text
    assert authors(found) == {"Abraham", "Evans", "Gorgolewski", "Power"}


def test_preprocessing_by_fmriprep_and_cleaning_are_told_with_their_numbers() -> None:
    cleaning = dataclasses.asdict(NO_CLEANING) | {
        "confounds": ["motion24", "csf"],
        "filter": "butterworth",
        "high_pass_hz": 0.009,
        "low_pass_hz": 0.081,
        "censor_above_fd_mm": None,
        "censor_above_std_dvars": 1.7,
    }
    found = of_set("bold", alignment="fmriprep", cleaning=cleaning, frames_dropped=5)
    (text,) = found.paragraphs
    for said in (
        "preprocessed by fMRIPrep (Esteban et al., 2019)",
        "5 frames before the steady state were dropped",
        "the confounds motion24 (Friston et al., 1996) and csf were regressed out",
        "Butterworth filter of order 5, forwards and backwards (above 0.009 Hz and below 0.081 Hz)",
        "standardised DVARS above 1.7",
    ):
        assert said in text, said
    assert authors(found) == {"Abraham", "Esteban", "Evans", "Friston", "Gorgolewski"}
    drifts = of_set("bold", cleaning=cleaning | {"filter": "cosine", "low_pass_hz": None, "high_pass_hz": 0.01})
    assert "and cosine drifts slower than 100 s (0.0100 Hz) were regressed out" in drifts.paragraphs[0]


def test_registration_is_cited_as_far_as_it_went() -> None:
    how = {"kind": "affine", "template_name": "2009aSym", "num_starts": 6, "min_similarity": 0.65}
    affine = of_set("t1", alignment="affine", registration=how)
    assert "the most similar of 6 starts was kept, and a correlation with it below 0.65 refused" in affine.paragraphs[0]
    assert authors(affine) == {"Abraham", "Avants", "Fonov", "Gorgolewski", "Tustison"}
    nonlinear = of_set("bold", alignment="nonlinear", registration=how | {"kind": "nonlinear"})
    assert "then by SyN (Avants et al., 2008)" in nonlinear.paragraphs[0]
    assert "aligned rigidly to the run's middle frame (Baker and Matthews, 2004)" in nonlinear.paragraphs[0]


def test_other_splits_spaces_and_atlases_are_named_as_they_are() -> None:
    fold = ReadingSplit("fold", 3, None, None, None, None, None, [], None, 7, 2, None)
    assert "fold 2 of 7 being tested and the next one validated on (seed 3)" in of_set("bold", rule=fold).paragraphs[0]
    surface = of_set("bold", space={"name": "fslr32k", "template": "fsLR"})
    assert "1,234 locations of the surface fsLR (Van Essen et al., 2012)" in surface.paragraphs[0]
    cube = {"name": "cube", "template": "none", "spacing_mm": 2.0, "edge_voxels": 128}
    assert "a cube of 128 x 2 mm" in of_set("t1", space=cube).paragraphs[0]
    aal3 = dataclasses.replace(GEOMETRY.atlas, name="aal3")
    assert "AAL3 [@aal3], of which 8 regions" in set_methods(made_up_set(), ["bold"], [aal3])


def pretraining(*overrides: str, kind: str = "bold") -> Methods:
    fixed = ["shards=made-up", "run.folder=run", "train.steps=1234", "train.schedule.warmup_steps=56", f"kind={kind}"]
    config = parse(compose("pretrain", [*fixed, *overrides]), PretrainConfig)
    window = config.window_of(kind)
    opened = SimpleNamespace(kind=kind, shard_set=made_up_set(), geometry=dataclasses.replace(GEOMETRY, window=window))
    task = SimpleNamespace(encoder=nn.Linear(1000, 1300, bias=False), decoder=nn.Linear(1000, 400, bias=False))
    sets: Any = {kind: opened}
    return methods(pretraining_methods(config, sets, task, baselines=["neighbour", "ridge"], step=1200))  # type: ignore[arg-type]


def test_pretraining_says_what_its_configuration_says() -> None:
    found = pretraining(
        "model.encoder.width=96",
        "model.encoder.depth=5",
        "masking.hidden_share=0.65",
        "masking.groups=[limbic,cerebellum]",
        "data.batch_size=48",
        "train.optimizer.learning_rate=0.00037",
        "weight_decay=0.07",
        "report.intervals.num_resamples=777",
        "report.contribution.num_samples=8",
        "report.contribution.false_discovery_rate=0.1",
        "train.engine.precision=bf16",
        "train.seed=23",
    )
    _, model, training, scores = found.paragraphs
    for said in (
        "windows of 20 frames, patches of 6 x 6 x 6 voxels by 4 frames",
        "65 % were hidden (region masking",
        "only in limbic and cerebellum",
        "of 5 blocks, width 96 and 4 heads (1.3 million parameters)",
        "of 2 cross-attention blocks and width 128 (0.4 million parameters)",
    ):
        assert said in model, said
    for said in (
        "1,234 steps of 48 samples with AdamW",
        "learning rate 0.00037",
        "betas 0.9 and 0.95",
        "weight decay 0.07",
        "56 steps of linear warm-up, then half a cosine (Loshchilov and Hutter, 2017) to 1 %",
        "bfloat16",
        "on 1 process with PyTorch (Paszke et al., 2019) and DeepSpeed ZeRO stage 2 (Rajbhandari et al., 2020), seed",
        "the last checkpoint was evaluated (step 1200)",
    ):
        assert said in training, said
    for said in ("4 nearest visible patches and ridge", "777 bootstrap", "rate over regions is 0.1 (Benjamini"):
        assert said in scores, said
    assert "global signal" not in scores
    assert {"He", "Tong", "Benjamini", "Rao"} <= authors(found)


def test_pretraining_cites_nothing_that_it_did_not_use() -> None:
    found = pretraining("engine=plain", "train.schedule.kind=constant", "train.optimizer.kind=adam", kind="t1")
    assert "single images, patches of 6 x 6 x 6 voxels)" in found.paragraphs[1]
    assert not {"Tong", "Benjamini", "Rajbhandari", "Pedregosa", "Loshchilov"} & authors(found)
    assert "Kingma" in authors(found)


def prediction(*overrides: str, is_class: bool = True) -> Methods:
    fixed = ["shards=made-up", "encoder=models:/some-backbone@candidate", "run.folder=run", "task.atlas=octants"]
    run = parse(compose("finetune", [*fixed, *overrides]), FinetuneConfig)
    config = parse_task(run.task, Config)
    encoder = EncoderConfig(96, 5, 4, 4.0, 64, "seconds")
    metrics = CLASS_METRICS if is_class else VALUE_METRICS
    paragraphs = prediction_methods(
        run, config, made_up_set(), encoder=encoder, num_frames=480, metrics=metrics, step=40
    )
    return methods(paragraphs)


def test_fine_tuning_says_what_its_configuration_says() -> None:
    found = prediction("task.head.num_channels=11", "bootstrap.num_resamples=1357", "task.baselines.num_folds=4")
    _, model, training, scores = found.paragraphs
    for said in (
        "Predicted was diagnosis: ADHD against control.",
        "models:/some-backbone@candidate",
        "of 5 blocks and width 96",
        "24 consecutive windows of each BOLD run (480 frames)",
        "projected to 11 channels",
        "before the encoder was trained (Kumar et al., 2022)",
        "The head's learning rate was 0.1 times that of the run.",
        "opened from the top down, from step 20, a further one after every 10 steps",
        "was 0.5 times that of the run, and every deeper one's 0.7 times that of the layer above",
    ):
        assert said in model, said
    assert "the checkpoint with the highest validation/auroc was evaluated (step 40)" in training
    for said in ("penalty chosen in 4 folds", "AUROC within sites, AUROC and balanced accuracy", "1,357 bootstrap"):
        assert said in scores, said
    assert {"Pedregosa", "Platt", "Rao", "Kumar"} <= authors(found)


def test_a_predicted_value_cites_no_calibration_and_a_head_from_zero_no_probe() -> None:
    age = ["~task.label", "+task.label={column: age, unit: years}", "task.probe=null", "task.head.pooling=attention"]
    found = prediction(*age, is_class=False)
    assert "Predicted was age, in years." in found.paragraphs[1]
    assert "The encoder stayed as it was." in prediction("task.unfreezing.first_layer_opens_at_step=60").paragraphs[1]
    assert "The head started at zero." in found.paragraphs[1]
    assert "ridge regression (Pedregosa et al., 2011)" in found.paragraphs[3]
    assert not {"Platt", "Kumar"} & authors(found)
    assert not any(MARK.search(paragraph) for paragraph in found.paragraphs)
