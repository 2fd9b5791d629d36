"""FID, sFID, Inception Score, precision, recall, image resizing and the Inception network against
outputs of OpenAI's ADM evaluator under TensorFlow.
"""

import json
import os
import zlib
from functools import cached_property

import numpy as np
import pytest
import torch
from helpers import GOLDEN_ROOT

from t2i.evaluation.fid import inception, measures
from t2i.evaluation.fid.fid_score import read_statistics
from t2i.weights import load_strict


class EvaluatorCase:
    """A folder with the evaluator's inputs and outputs."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        self.neighbour = config["knn_k"]
        self.expected = json.loads((folder / "expected.json").read_text())

    @cached_property
    def features(self):
        return np.load(self.folder / "features.npz")

    @cached_property
    def arrays(self):
        return np.load(self.folder / "expected_arrays.npz")

    def array(self, name, first=None):
        return torch.from_numpy(self.features[name].astype(np.float32))[:first]

    def spatial(self, name):
        """The stored maps [N, H, W, C], put in our network's layout and flattened by our rule."""
        maps = self.array(f"spatial_{name}_nhwc").movedim(-1, 1)
        return inception.flatten_spatial(maps, self.config["sfid_channels"])

    def sides(self, entry):
        return (
            self.array(entry["ref_array"], entry["ref_first_n"]),
            self.array(entry["sample_array"], entry["sample_first_n"]),
        )


def found_cases():
    for path in sorted(GOLDEN_ROOT.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "fid_cases" in config:
            yield pytest.param(EvaluatorCase(path.parent, config), id=path.parent.name)


CASES = list(found_cases())
assert CASES or "T2I_GOLDEN" in os.environ


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


def close(value, expected, relative=0.0, absolute=0.0):
    return value == pytest.approx(expected, rel=relative, abs=absolute)


def test_defaults_are_the_official_ones():
    assert (measures.NEIGHBOUR, measures.SPLIT_SIZE, inception.INPUT_SIZE) == (3, 5000, 299)
    assert (inception.POOL_WIDTH, inception.SPATIAL_WIDTH) == (2048, 2023)


def test_statistics(case):
    found, arrays = measures.feature_statistics(case.array("sample")), case.arrays
    assert str(found.mean.dtype).endswith(case.expected["dtypes"]["mu"])
    assert str(found.covariance.dtype).endswith(case.expected["dtypes"]["sigma"])
    np.testing.assert_allclose(found.mean, arrays["sample_mu"], rtol=1e-5, atol=1e-7)
    covariance = found.covariance.numpy()
    np.testing.assert_allclose(covariance.diagonal(), arrays["sample_sigma_diag"], rtol=1e-9)
    np.testing.assert_allclose(
        covariance[0], arrays["sample_sigma_first_row"], rtol=1e-9, atol=1e-12
    )


def test_fid(case):
    for name in case.config["fid_cases"]:
        entry = case.expected["fid"][name]
        samples = case.array(entry["sample_array"], entry.get("sample_first_n"))
        if "stats_file" in entry:
            reference = read_statistics(case.folder / entry["stats_file"], "mu", "sigma")
        else:
            reference = measures.feature_statistics(
                case.array(entry["ref_array"], entry["ref_first_n"])
            )
        value = measures.frechet_distance(measures.feature_statistics(samples), reference)
        relative = 1e-4 if "singular" in name else 1e-6
        assert close(value, entry["official"], relative, absolute=1e-6), name


def test_sfid(case):
    expected = case.expected["sfid"]
    samples = measures.feature_statistics(case.spatial("sample"))
    assert len(samples.mean) == expected["dim"]
    stored = read_statistics(case.folder / "ref_batch_with_stats.npz", "mu_s", "sigma_s")
    value = measures.frechet_distance(samples, stored)
    assert close(value, expected["sample_vs_stored_ref_stats"], 1e-6)
    reference = measures.feature_statistics(case.spatial("ref"))
    value = measures.frechet_distance(samples, reference)
    assert close(value, expected["sample_vs_ref_both_from_activations"], 1e-6)


def test_inception_score(case):
    weight = case.array("softmax_w").T
    probabilities = measures.class_probabilities(case.array("sample"), weight)
    first = case.arrays["softmax_sample_first_8"]
    np.testing.assert_allclose(probabilities[: len(first)], first, rtol=1e-5, atol=1e-6)
    for name, expected in case.expected["inception_score"].items():
        if not isinstance(expected, float):
            continue
        array, split_size = name.split(".split_size_")
        by_class = "_sorted_by_predicted_class"
        features = case.array(array.removesuffix(by_class))
        if array.endswith(by_class):
            features = features[(features @ weight.T).argmax(1).argsort(stable=True)]
        probabilities = measures.class_probabilities(features, weight)
        assert close(measures.inception_score(probabilities, int(split_size)).mean, expected, 1e-5)


def test_precision_and_recall_as_the_evaluator_rounds(case):
    for name in case.config["precision_recall_cases"]:
        entry = case.expected["precision_recall"][name]
        reference, samples = case.sides(entry)
        for pair, took in entry["official_took_fp16_branch"].items():
            sets = {"ref": reference, "sample": samples}
            u, v = (sets[side] for side in pair.split("_"))
            assert bool(measures.half_distances(u, v).isfinite().all()) == took, (name, pair)
        found = measures.compare_manifolds(reference, samples, neighbour=case.neighbour)
        # Only in this case the result depends on rounding; the expected values come from one CPU.
        tolerance = 0.01 if name == "small" else 0
        assert close(found.precision, entry["official_precision"], absolute=tolerance), name
        assert close(found.recall, entry["official_recall"], absolute=tolerance), name
        # The rounding error of half precision grows with the norms, not with the distances.
        largest = max(float(side.square().sum(1).max()) for side in (reference, samples))
        rounding = 2e-3 * largest if any(entry["official_took_fp16_branch"].values()) else 0
        for side, radii in (("ref", found.reference_radii), ("sample", found.sample_radii)):
            expected = case.arrays[f"{name}.official_radii_{side}"]
            np.testing.assert_allclose(radii, expected, rtol=5e-3, atol=rounding, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_recall_without_half_precision(case, dtype):
    bits = str(dtype)[-2:]
    for name in case.config["precision_recall_cases"]:
        entry = case.expected["precision_recall"][name]
        sides = (features.to(dtype) for features in case.sides(entry))
        found = measures.compare_manifolds(*sides, measures.full_distances, case.neighbour)
        assert close(found.precision, entry[f"fp{bits}_precision"], absolute=1e-12), name
        assert close(found.recall, entry[f"fp{bits}_recall"], absolute=1e-12), name
        np.testing.assert_allclose(
            found.reference_radii, case.arrays[f"{name}.fp64_radii_ref"], rtol=1e-4
        )


def test_resize(case):
    inputs = np.load(case.folder / "resize_inputs.npz")
    expected = np.load(case.folder / "resize_expected.npz")
    assert set(case.config["resize_sets"]) <= set(inputs.files)
    for name in expected.files:
        images, kind = name.split(".")
        resized = inception.tf1_resize(
            torch.from_numpy(inputs[images]), case.config["resize_to"]
        ).movedim(1, -1)
        if kind.startswith("stride"):
            step = int(kind.removeprefix("stride"))
            resized = resized[:, ::step, ::step]
        else:
            resized = resized[int(kind.removeprefix("full"))]
        np.testing.assert_allclose(resized, expected[name], atol=1e-4, err_msg=name)


def formula_weights(name, shape):
    """Weights of the golden network: each is a hash of its key's name and its position."""
    x = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(2654435761)
    seed = zlib.crc32(name.encode()) * 2246822519 + 374761393
    x += np.uint32(seed % 2**32)
    for shift, factor in ((15, 2246822519), (13, 3266489917), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    u = x.reshape(shape) / 2**32
    if name.endswith("bn.weight"):
        return np.ones_like(u)
    if name.endswith("running_var"):
        return 0.5 + u
    if name.endswith("conv.weight"):
        return (2 * u - 1) * np.sqrt(6 / np.prod(shape[1:]))
    return (2 * u - 1) * {"fc.weight": 0.05, "fc.bias": 0.1}.get(name, 0.2)


def test_network(case):
    listed = json.loads((case.folder / "inception_formula_weights.json").read_text())
    state = {
        name: torch.from_numpy(formula_weights(name, shape).astype(np.float32))
        for name, shape in listed["keys_and_shapes"].items()
    }
    for name, values in listed["first_three_values"].items():
        np.testing.assert_allclose(state[name].flatten()[:3], values, rtol=1e-6)
    network = inception.Inception().eval().requires_grad_(False)
    load_strict(network, state, "formula weights")
    inputs = np.load(case.folder / "resize_inputs.npz")
    expected = np.load(case.folder / "inception_formula_weights_expected.npz")
    for images in {name.split(".")[0] for name in expected.files}:
        features = inception.extract(network, list(inputs[images]))
        found = {
            "pool_2048": features.pool,
            "spatial_2023": features.spatial,
            "logits_unbiased_1008": features.pool @ network.fc.weight.T,
        }
        for name, value in found.items():
            target = expected[f"{images}.{name}"]
            np.testing.assert_allclose(value, target, rtol=0, atol=1e-3 * np.abs(target).max())
