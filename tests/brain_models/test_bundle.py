"""Bundles give back the model they were made of, whatever its kind, or say why not."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import yaml
from torch import Tensor, nn

from brain_models import bundle as bundles
from brain_models import models
from brain_models.atlas import Atlas
from brain_models.bundle import Bundle
from brain_models.encoder import EncoderConfig
from brain_models.errors import BundleError, ScanError
from brain_models.heads import HeadConfig
from brain_models.inputs import Column, Row, Stems, StemSpec
from brain_models.models import ModelKind
from brain_models.patches import PatchLayout
from brain_models.preprocess import dequantise, pack_bold, standardise_bold
from brain_models.recipe import BoldPreprocessing, CleaningConfig
from brain_models.run_predictor import (
    RunClassifierConfig,
    RunPredictor,
    RunRegressorConfig,
    answer_class,
    run_predictor,
)
from brain_models.served import ServedModel
from brain_models.space import BrainSpace, space_from_mask
from tests.bundles import clusters, cubes, encoder_bundle
from tests.scans import GRID_AFFINE, GRID_SHAPE, save_scan

CONFIG = EncoderConfig(width=32, depth=2, num_heads=4, mlp_ratio=2.0, num_frequencies=4, time_in="seconds")
HEAD = HeadConfig(pooling="covariance", num_channels=3, dropout=0.0)


@pytest.fixture
def space() -> BrainSpace:
    in_brain = np.zeros(GRID_SHAPE, dtype=bool)
    in_brain[4:9, 5:11, 4:8] = True
    return space_from_mask(in_brain, GRID_AFFINE, name="box", template="NLin6Asym")


@pytest.fixture
def stem(space: BrainSpace) -> StemSpec:
    labels = np.random.default_rng(0).choice([0, 3, 7, 170], size=space.num_voxels).astype(np.int32)
    atlas = Atlas("few", labels, {3: "three", 7: "seven", 170: "last"}, {"end": [170]})
    return dataclasses.replace(cubes(space, 2, tubelet_frames=2), atlas=atlas)


@pytest.fixture
def encoder_alone(stem: StemSpec) -> Bundle:
    torch.manual_seed(0)
    bundle = encoder_bundle(CONFIG, {"bold": stem}, run="a")
    bundle.encoder.stem("bold").voxel_offset.normal_()
    return bundle


def predictor(bundle: Bundle) -> RunPredictor:
    model = run_predictor(bundle.encoder, bundle.stems["bold"], HEAD).eval()
    nn.init.normal_(model.head.linear.weight)
    return model


def classifier(bundle: Bundle) -> Bundle:
    config = RunClassifierConfig(CONFIG, HEAD, segment_frames=8, positive="ADHD", negative="control", threshold=0.4)
    return Bundle("run_classifier", config, predictor(bundle), bundle.stems, {})


def run_of(space: BrainSpace, num_frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-60, 60, size=(num_frames, space.num_voxels)).astype(np.int8)


def served(folder: Path) -> ServedModel:
    model = ServedModel()
    model.bundle = bundles.load(folder)
    return model


def test_a_bundle_gives_back_the_same_encoder_and_what_its_stems_read(
    encoder_alone: Bundle, stem: StemSpec, tmp_path: Path
) -> None:
    cleaning = CleaningConfig(["motion6"], 0.01, None, "cosine", True, "drop", None, None)  # noqa: FBT003
    stem.preprocessing = BoldPreprocessing(cleaning, "float16", "refuse", needs_confounds=True)
    loaded = bundles.load(bundles.save(tmp_path / "b", encoder_alone))
    assert loaded.made_by["run"] == "a"
    for name, tensor in encoder_alone.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    again = loaded.stems["bold"]
    assert again.preprocessing == stem.preprocessing
    assert (again.space.fingerprint, again.layout.fingerprint) == (stem.space.fingerprint, stem.layout.fingerprint)
    assert again.layout.patch_voxels == 2
    assert again.atlas is not None
    assert again.atlas.names == stem.atlas.names
    np.testing.assert_array_equal(again.atlas.labels, stem.atlas.labels)


def test_patches_cut_by_labels_travel_with_the_bundle(space: BrainSpace, tmp_path: Path) -> None:
    stem = clusters(space, 7, tubelet_frames=2)
    saved, layout = encoder_bundle(CONFIG, {"bold": stem}), stem.layout
    loaded = bundles.load(bundles.save(tmp_path / "b", saved))
    np.testing.assert_array_equal(loaded.stems["bold"].layout.gather, layout.gather)
    assert loaded.encoder.stem("bold").num_features == layout.gather.shape[1] * 2


def test_a_served_classifier_answers_with_the_mean_logit_of_whole_segments(
    encoder_alone: Bundle, space: BrainSpace, tmp_path: Path
) -> None:
    saved = classifier(encoder_alone)
    model = served(bundles.save(tmp_path / "b", saved))
    assert model.bundle.config == saved.config
    runs = [run_of(space, num_frames, seed) for seed, num_frames in enumerate((16, 23, 8))]
    table = pandas.DataFrame({"bold": runs, "repetition_time_s": [2.0, 1.5, 0.8]}, index=["a", "b", "c"])
    answers = model.predict(None, table)
    for name, run in zip(table.index, runs, strict=True):
        values = torch.from_numpy(dequantise(run))[None]
        is_measured = torch.from_numpy(run[0] != -128)[None]
        seconds = torch.tensor([table.repetition_time_s[name]], dtype=torch.float32)
        with torch.inference_mode():
            logits = [
                float(saved.model(values[:, first : first + 8], is_measured, seconds))
                for first in range(0, len(run) - 7, 8)
            ]
        assert answers.probability_of_ADHD[name] == pytest.approx(1 / (1 + np.exp(-np.mean(logits))), abs=1e-6)
        assert answers.prediction[name] == ("ADHD" if answers.probability_of_ADHD[name] >= 0.4 else "control")
    assert answers.probability_of_ADHD.std() > 1e-3
    short = pandas.DataFrame({"bold": [run_of(space, 7, 0)], "repetition_time_s": [2.0]}, index=["short"])
    with pytest.raises(ScanError, match=r"row short: 7 frames; this model needs at least 8"):
        model.predict(None, short)
    with pytest.raises(ScanError, match=r"row 0: columns \['t1w'\]; this model needs a column bold"):
        model.predict(None, pandas.DataFrame({"t1w": ["x.nii.gz"], "bold": [None]}))


def test_a_served_regressor_answers_in_the_unit_it_learned(
    encoder_alone: Bundle, space: BrainSpace, tmp_path: Path
) -> None:
    model = predictor(encoder_alone)
    config = RunRegressorConfig(CONFIG, HEAD, segment_frames=8, value="age", mean=11.5, scale=2.5)
    folder = bundles.save(tmp_path / "b", Bundle("run_regressor", config, model, encoder_alone.stems, {}))
    run = run_of(space, 8, seed=1)
    answers = served(folder).predict(None, pandas.DataFrame({"bold": [run], "repetition_time_s": [2.0]}))
    with torch.inference_mode():
        arguments = (torch.from_numpy(dequantise(run))[None], torch.from_numpy(run[0] != -128)[None])
        output = float(model(*arguments, torch.tensor([2.0])))
    assert abs(output) > 1e-3
    assert answers.columns.tolist() == ["subject", "session", "prediction"]
    assert answers.prediction[0] == pytest.approx(11.5 + 2.5 * output, abs=1e-5)


def test_a_classifier_on_a_backbone_of_several_spaces_is_a_bundle(space: BrainSpace, tmp_path: Path) -> None:
    finer = space_from_mask(np.ones((6, 6, 6), dtype=bool), GRID_AFFINE, name="finer", template="NLin6Asym")
    stems = {"bold": cubes(space, 2), "bold_0f": cubes(finer, 3), "t1": cubes(finer, 3, tubelet_frames=1)}
    head = HeadConfig(pooling="attention", num_channels=1, dropout=0.0)
    encoder = encoder_bundle(CONFIG, stems).encoder
    config = RunClassifierConfig(CONFIG, head, segment_frames=8, positive="a", negative="b", threshold=0.5)
    model = run_predictor(encoder, stems["bold"], head)
    loaded = bundles.load(bundles.save(tmp_path / "b", Bundle("run_classifier", config, model, stems, {})))
    assert {name: stem.space.name for name, stem in loaded.stems.items()} == {
        "bold": "box",
        "bold_0f": "finer",
        "t1": "finer",
    }


@pytest.mark.parametrize("num_frames", [8, 10])
def test_a_scan_is_embedded_as_it_is_served_and_a_region_is_the_mean_of_its_voxels_patches(
    num_frames: int, encoder_alone: Bundle, stem: StemSpec, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(size=(*GRID_SHAPE, num_frames)) + 100
    path = str(save_scan(tmp_path / "scan_bold.nii.gz", values, GRID_AFFINE))
    model = served(bundles.save(tmp_path / "b", encoder_alone))
    row = {"bold": path, "repetition_time_s": 2.0}
    embedding = model.bundle.embed(row)
    in_table = model.predict(None, pandas.DataFrame([row])).filter(like="embedding_").iloc[0].to_numpy()
    np.testing.assert_allclose(embedding.scan.numpy(), in_table, atol=1e-6)

    stored = standardise_bold(pack_bold(path, stem.space, brain_mask=None))
    frames = torch.from_numpy(dequantise(stored.quantised))[None]
    is_measured, seconds = torch.from_numpy(stored.is_measured)[None], torch.tensor([2.0])
    with torch.inference_mode():
        windows = [
            encoder_alone.encoder.encode_windows(frames[:, first : first + 4], is_measured, seconds, "bold")[0]
            for first in (0, 4)
        ]
    np.testing.assert_allclose(embedding.tokens.numpy(), torch.stack(windows).numpy(), atol=1e-6)
    by_patch = torch.stack(windows).reshape(2, 2, stem.layout.num_patches, 32).mean(dim=(0, 1)).numpy()
    assert embedding.region_names == ["three", "seven", "last"]
    for row_number, label in enumerate([3, 7, 170]):
        voxels = np.flatnonzero(stem.atlas.labels == label)
        expected = np.mean([by_patch[stem.layout.patch_of_voxel[voxel]] for voxel in voxels], axis=0)
        np.testing.assert_allclose(embedding.regions[row_number].numpy(), expected, atol=1e-5)


@dataclasses.dataclass
class ToyConfig:
    num_features: int


class Toy(nn.Module):
    """A later kind as its own module would define it: a linear map of anything, without encoder or scan."""

    def __init__(self, config: ToyConfig, stems: Stems) -> None:
        super().__init__()
        self.map = nn.Linear(config.num_features, 2)

    @staticmethod
    def examples(config: ToyConfig, stems: Stems, seed: int) -> Iterator[Tensor]:
        yield torch.from_numpy(np.random.default_rng(seed).normal(size=config.num_features).astype(np.float32))

    @staticmethod
    def read(row: Row, config: ToyConfig, stems: Stems) -> Tensor:
        return torch.tensor([row[name] for name in ("x", "y")])

    @staticmethod
    def compute(model: "Toy", config: ToyConfig, example: Tensor) -> Tensor:
        return model.map(example)[None]

    @staticmethod
    def answer(config: ToyConfig, outputs: Tensor) -> dict[str, np.ndarray]:
        """Distances between rows: an answer of which no row is independent of the others."""
        return {f"distance_{index}": column.numpy() for index, column in enumerate(torch.cdist(outputs, outputs).T)}


def test_a_later_kind_is_saved_loaded_and_served_by_one_row_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"x": Column(0.0, is_required=True), "y": Column(0.0, is_required=True)}
    toy = ModelKind(ToyConfig, Toy, Toy.examples, lambda stems: columns, Toy.read, Toy.compute, Toy.answer)
    monkeypatch.setitem(models.MODELS, "toy", toy)
    torch.manual_seed(0)
    bundle = Bundle("toy", ToyConfig(2), Toy(ToyConfig(2), {}), {}, {})
    folder = bundles.save(tmp_path / "b", bundle)
    face = bundles.interface(folder)
    assert (face.inputs, face.outputs) == (columns, {"distance_0": np.dtype("float32")})
    table = pandas.DataFrame({"x": [0.0, 3.0, 1.0], "y": [1.0, 1.0, -2.0]})
    answers = served(folder).predict(None, table).drop(columns=["subject", "session"]).to_numpy(float)
    mapped = table.to_numpy() @ bundle.model.map.weight.detach().numpy().T
    np.testing.assert_allclose(answers, np.linalg.norm(mapped[:, None] - mapped[None], axis=2), atol=1e-5)
    monkeypatch.delitem(models.MODELS, "toy")
    known = r"holds a 'toy', this code knows encoder, run_classifier, .*; use the code of commit"
    with pytest.raises(BundleError, match=known):
        bundles.load(folder)


def test_saving_a_bundle_asks_nothing_of_the_given_model_but_its_weights(encoder_alone: Bundle, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("under ZeRO 3 a forward pass on one rank waits for the others for ever")

    for module in encoder_alone.model.train().modules():
        module.register_forward_pre_hook(refuse)
    bundles.save(tmp_path / "b", encoder_alone)
    assert encoder_alone.model.training
    assert bundles.load(tmp_path / "b").encoder.config == CONFIG


def test_the_golden_output_is_computed_once_per_save_and_once_per_load(
    encoder_alone: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[Any] = []
    row = models.MODELS["encoder"]

    def compute(model: Any, config: Any, scan: Any) -> Tensor:
        inputs.append(scan)
        return row.compute(model, config, scan)

    monkeypatch.setitem(models.MODELS, "encoder", dataclasses.replace(row, compute=compute))
    bundles.save(tmp_path / "b", encoder_alone)
    assert len(inputs) == 1
    bundles.load(tmp_path / "b")
    assert len(inputs) == 2
    assert torch.equal(inputs[0].values, inputs[1].values)


def test_a_bundle_that_computes_something_else_is_refused_and_names_the_commit(
    encoder_alone: Bundle, tmp_path: Path
) -> None:
    folder = bundles.save(tmp_path / "b", encoder_alone)
    golden = np.load(folder / "golden.npy")
    np.save(folder / "golden.npy", golden + 2e-4)
    with pytest.raises(BundleError, match=r"golden output is off by 0\.0002 .* than commit \w+"):
        bundles.load(folder)
    np.save(folder / "golden.npy", golden)
    assert bundles.load(folder).encoder is not None
    (folder / "weights.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(BundleError, match=r"weights\.safetensors cannot be read"):
        bundles.load(folder)
    with pytest.raises(BundleError, match="is this a bundle folder"):
        bundles.load(tmp_path)


def test_weights_of_another_model_and_a_damaged_golden_output_are_refused(
    encoder_alone: Bundle, tmp_path: Path
) -> None:
    folder = bundles.save(tmp_path / "b", encoder_alone)
    deeper = encoder_bundle(dataclasses.replace(CONFIG, depth=3), encoder_alone.stems)
    weights = bundles.save(tmp_path / "deeper", deeper) / "weights.safetensors"
    (folder / "golden.npy").write_bytes(b"no numbers")
    with pytest.raises(BundleError, match=r"golden\.npy cannot be read .* fetch the bundle again"):
        bundles.load(folder)
    (folder / "weights.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(BundleError, match=r"(?s)weights do not fit model\.yaml .*blocks\.2"):
        bundles.load(folder)


def test_a_run_predictor_reads_windows_in_order_of_time(encoder_alone: Bundle, space: BrainSpace) -> None:
    model = predictor(encoder_alone)
    values = torch.from_numpy(dequantise(run_of(space, 10, seed=0)))[None].repeat(2, 1, 1)
    values[1] = values[1].flip(0)
    arguments = (torch.ones(2, space.num_voxels, dtype=torch.bool), torch.tensor([2.0, 0.8]))
    with torch.inference_mode():
        tokens = model.tokens(values, *arguments)
        windows = [model.encoder.encode_windows(values[:, first : first + 4], *arguments, "bold") for first in (0, 4)]
    num_patches = encoder_alone.stems["bold"].layout.num_patches
    for number, window in enumerate(windows):
        for tubelet in range(2):
            expected = window[:, tubelet * num_patches : (tubelet + 1) * num_patches]
            torch.testing.assert_close(tokens[:, 2 * number + tubelet], expected, rtol=0, atol=1e-5)


def test_a_run_is_called_positive_from_its_threshold_on() -> None:
    config = RunClassifierConfig(CONFIG, HEAD, segment_frames=8, positive="ADHD", negative="control", threshold=0.25)
    logits = torch.tensor([[-2.0], [float(np.log(0.25 / 0.75))], [-0.5], [3.0]], dtype=torch.float64)
    answers = answer_class(config, logits)
    assert answers["prediction"].tolist() == ["control", "ADHD", "ADHD", "ADHD"]
    np.testing.assert_allclose(answers["probability_of_ADHD"], 1 / (1 + np.exp(-logits[:, 0].numpy())))
    np.testing.assert_allclose(answers["probability_of_control"], 1 / (1 + np.exp(logits[:, 0].numpy())))


def test_a_bundle_of_an_older_schema_is_refused_with_what_to_do(encoder_alone: Bundle, tmp_path: Path) -> None:
    path = bundles.save(tmp_path / "b", encoder_alone) / "model.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"schema": 2}))
    with pytest.raises(BundleError, match=r"has schema 2, this code reads 3; run the command that made it again"):
        bundles.load(tmp_path / "b")


@pytest.mark.parametrize("file", ["space", "layout"])
def test_a_bundle_with_another_space_or_layout_is_refused(file: str, encoder_alone: Bundle, tmp_path: Path) -> None:
    folder = bundles.save(tmp_path / "b", encoder_alone)
    space = encoder_alone.stems["bold"].space
    other = dataclasses.replace(space, positions_mm=space.positions_mm + np.float32([0, 0, 3]))
    saved = {"space": other, "layout": PatchLayout.from_grid(other, 2)}[file]
    saved.save(folder / f"{file}_bold.npz")
    with pytest.raises(BundleError, match=rf"{file}_bold\.npz is not the {file} this model was trained on; fetch"):
        bundles.load(folder)
