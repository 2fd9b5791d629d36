"""Scoring sets of images (FID, sFID, IS, precision, recall): inputs, refusals, scores, program."""

import json
import logging
import os
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from launch import fid as program
from t2i import cli
from t2i.errors import UserError
from t2i.evaluation.fid import fid_score as fid
from t2i.evaluation.fid import inception, measures
from t2i.evaluation.fid.image_sets import open_images, read_npz_array
from t2i.evaluation.fid.inception import InceptionFeatures, extract
from t2i.rng import integers, make_keys, normals


def pictures(count, seed=0, side=8, shift=0):
    images = integers(make_keys(seed), 200 - shift, count, side, side, 3) + shift
    return images.to(torch.uint8).numpy()


def write_folder(folder, images, name="{:03d}.png"):
    for i, image in enumerate(images):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_npz(path, images, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images, **arrays)
    return path


def read(path, size=3):
    return [image for batch in open_images(path).batches(size) for image in batch]


@pytest.fixture
def network(monkeypatch):
    """Replaces Inception by four features of an image's mean color and a head of two classes."""
    weights = normals(make_keys(5), 3, 4)

    def tiny(network, images):
        pool = torch.stack([torch.tensor(i).float().mean((0, 1)) @ weights for i in images])
        return InceptionFeatures(pool, pool[:, :2] * 2)

    monkeypatch.setattr(fid, "extract", tiny)
    monkeypatch.setattr(fid, "POOL_WIDTH", 4)
    monkeypatch.setattr(fid, "SPATIAL_WIDTH", 2)
    return SimpleNamespace(fc=SimpleNamespace(weight=torch.eye(4)[:2]))


def score(samples, reference, network, **options):
    options = {"allow_fewer": True, "batch_size": 3, **options}
    return fid.score_images(samples, reference, network, "abc", **options)


# -- reading ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_read_in_batches_in_file_order(tmp_path, compressed):
    images = pictures(7)
    path = write_npz(tmp_path / "a.npz", images, compressed)
    assert open_images(path).count == 7
    np.testing.assert_array_equal(read(path), images)
    assert [len(batch) for batch in open_images(path).batches(3)] == [3, 3, 1]


@pytest.mark.parametrize("count", [2991, 10**12])
def test_an_npz_with_fewer_images_than_its_header_says_is_refused(tmp_path, count):
    """The cut was found after all other images were judged, or was "not enough memory"."""
    path, (height, width, _) = tmp_path / "a.npz", pictures(1)[0].shape
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        shape = (count, height, width, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(2990 * height * width * 3))
    with pytest.raises(
        UserError, match=r"a\.npz: the header of arr_0 says \[\d+, 8, 8, 3\], but only"
    ):
        open_images(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pictures(2)}, r"has no arr_0 .*mu and sigma.*; it holds images"),
        ({"arr_0": pictures(2) / 255}, r"arr_0 is float64 \[2, 8, 8, 3\]; images must be uint8"),
        ({"arr_0": pictures(2)[..., :1]}, r"uint8 \[2, 8, 8, 1\]"),
        ({"arr_0": np.asfortranarray(pictures(2))}, "Fortran order"),
        ({"arr_0": pictures(2)[:0]}, r"uint8 \[0, 8, 8, 3\]"),
    ],
)
def test_npz_files_without_uint8_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "a.npz")


def test_damaged_or_missing_files_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"a\.npz is not a readable \.npz.*; give an \.npz"):
        open_images(tmp_path / "a.npz")
    path = write_npz(tmp_path / "b.npz", pictures(50))
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.npz is damaged: Bad CRC"):
        read(path)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    with pytest.raises(ValueError, match=r"d\.npz is damaged: .*magic"):
        open_images(tmp_path / "d.npz")
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("arr_0", b"not named as an array")
    with pytest.raises(ValueError, match=r"e\.npz is damaged: .*no item named 'arr_0\.npy'"):
        open_images(tmp_path / "e.npz")
    with pytest.raises(ValueError, match="none does not exist; give an"):
        open_images(tmp_path / "none")
    with pytest.raises(ValueError, match="null is no regular file; give an"):
        open_images(os.devnull)
    (tmp_path / "c").mkdir()
    for folder in (tmp_path, tmp_path / "c"):
        with pytest.raises(ValueError, match="holds no images"):
            open_images(folder)


def test_folders_of_any_layout(tmp_path):
    images = pictures(4)
    flat = write_folder(tmp_path / "flat", images)
    (flat / "notes.txt").write_text("no image")
    np.testing.assert_array_equal(read(flat), images)
    nested = write_folder(tmp_path / "nested", images, "class_{:03d}/x.png")
    np.testing.assert_array_equal(read(nested), images)


def test_only_the_samples_of_a_generation_folder_are_read(tmp_path):
    images = pictures(4)
    folder = write_folder(tmp_path, images, "{:05d}/samples/00000.png")
    write_folder(tmp_path, pictures(4, seed=1), "{:05d}/stages/00000_1.png")
    write_folder(tmp_path, pictures(1, seed=2), "grid.png")
    np.testing.assert_array_equal(read(folder), images)
    assert open_images(folder).left_out == 5
    np.testing.assert_array_equal(read(folder / "00001" / "samples"), images[1:2])


def test_a_broken_image_is_named(tmp_path):
    folder = write_folder(tmp_path, pictures(4))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"002\.png cannot be judged: corrupt"):
        read(folder)


# -- scores ----------------------------------------------------------------------------------------
def test_a_set_compared_with_itself(tmp_path, network, caplog):
    images = pictures(12)
    folder = write_folder(tmp_path / "images", images)
    file = write_npz(tmp_path / "a.npz", images)
    found = score(file, folder, network)
    scores = found["scores"]
    assert scores["fid"] == pytest.approx(0, abs=1e-6)
    assert scores["sfid"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"]) == (1, 1)
    assert found["samples"]["pixels_sha256"] == found["reference"]["pixels_sha256"]
    assert f"{file} and {folder} hold the same images" in caplog.text
    assert "copies" not in caplog.text
    caplog.clear()
    other = score(write_folder(tmp_path / "other", pictures(12, shift=80)), folder, network)
    assert other["scores"]["fid"] > 1 and other["scores"]["sfid"] > 1
    assert other["samples"]["pixels_sha256"] != found["samples"]["pixels_sha256"]
    assert "the same images" not in caplog.text


def test_precision_and_recall_are_not_swapped(tmp_path, network):
    """Samples that are half of the reference lie within it (precision 1) but do not cover it."""
    images = np.concatenate([pictures(10, shift=150), pictures(10) // 4])
    found = score(
        write_npz(tmp_path / "a.npz", images[:10]), write_npz(tmp_path / "b.npz", images), network
    )
    assert found["scores"]["precision"] == 1
    assert found["scores"]["recall"] == pytest.approx(0.5, abs=0.1)


def test_the_batch_size_does_not_matter(tmp_path, network):
    a = write_npz(tmp_path / "a.npz", pictures(12))
    b = write_folder(tmp_path / "b", pictures(9, seed=1))
    first, second = (score(a, b, network, batch_size=size) for size in (1, 100))
    assert first["scores"] == pytest.approx(second["scores"], rel=1e-6)
    assert first["samples"] == second["samples"]


def test_results_do_not_depend_on_torchs_default_dtype(tmp_path, network):
    samples = write_npz(tmp_path / "a.npz", pictures(8))
    wanted = score(samples, samples, network)["inception_score"]
    torch.set_default_dtype(torch.bfloat16)  # as other models' code does
    try:
        assert score(samples, samples, network)["inception_score"] == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def test_stored_statistics_are_used_instead_of_the_images(tmp_path, network):
    samples = write_npz(tmp_path / "a.npz", pictures(12))
    plain = score(samples, write_npz(tmp_path / "plain.npz", pictures(9, seed=1)), network)
    statistics = {
        "mu": np.zeros(4, np.float32),
        "sigma": np.eye(4),
        "mu_s": np.ones(2, np.float32),
        "sigma_s": np.eye(2),
    }
    path = write_npz(tmp_path / "official.npz", pictures(9, seed=1), **statistics)
    official = score(samples, path, network)
    assert official["reference"]["statistics"] == "stored in the file"
    assert len(official["reference"]["sha256"]) == 64
    for name in ("precision", "recall", "inception_score"):
        assert official["scores"][name] == plain["scores"][name]
    measured = fid.measure(samples, network, batch_size=4, description="")
    for name, found, mean in (
        ("fid", measured.pool, torch.zeros(4)),
        ("sfid", measured.spatial, torch.ones(2)),
    ):
        stored = measures.Statistics(mean, torch.eye(len(mean), dtype=torch.float64))
        assert official["scores"][name] == pytest.approx(measures.frechet_distance(found, stored))

    np.savez(tmp_path / "statistics.npz", **statistics)
    alone = score(samples, tmp_path / "statistics.npz", network)["scores"]
    assert (alone["precision"], alone["recall"]) == (None, None)
    assert (alone["fid"], alone["sfid"]) == (official["scores"]["fid"], official["scores"]["sfid"])
    np.savez(tmp_path / "only_fid.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    assert score(samples, tmp_path / "only_fid.npz", network)["scores"]["sfid"] is None


def test_a_stored_mean_is_not_rounded(tmp_path):
    """ADM's evaluator subtracts the mean in the precision in which it is stored."""
    mean = np.full(4, 1 + 1e-8)
    np.savez(tmp_path / "stored.npz", mu=mean, sigma=np.eye(4))
    stored = fid.read_statistics(tmp_path / "stored.npz", "mu", "sigma")
    assert stored.mean.tolist() == mean.tolist()


@pytest.mark.parametrize("dtype", [">f8", ">f4", np.longdouble])
def test_statistics_of_other_machines(tmp_path, dtype):
    """PyTorch takes neither their byte order nor their widest floats, and ended in a traceback."""
    mean, covariance = np.arange(4.0).astype(dtype), np.eye(4).astype(dtype)
    np.savez(tmp_path / "stored.npz", mu=mean, sigma=covariance)
    stored = fid.read_statistics(tmp_path / "stored.npz", "mu", "sigma")
    assert stored.mean.tolist() == [0, 1, 2, 3] and torch.equal(
        stored.covariance, torch.eye(4).double()
    )


def test_a_damaged_header_is_refused(tmp_path):
    """NumPy raises an error of Python's tokenizer for it."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (8, 8, 8, 3, }\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(1536)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", array)
        archive.writestr("mu.npy", array)
    with pytest.raises(UserError, match=r"a\.npz is damaged"):
        open_images(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"a\.npz: mu cannot be read"):
        read_npz_array(tmp_path / "a.npz", "mu")


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "mu has 5 features, this network has 4"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"mu is \[4\] and sigma is \[5, 5\]"),
        ({"mu": np.zeros(4)}, "has no sigma; it holds mu"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu is \[0\] .* expected \[D\] and"),
        ({"mu": np.zeros(4), "sigma": np.tri(4)}, "sigma is no covariance: it must be symmetric"),
        ({"mu": np.zeros(4), "sigma": -np.eye(4)}, "not negative on its diagonal"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(7), "sigma_s": np.eye(7)},
            "mu_s has 7 features, this network has",
        ),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "mu must hold finite numbers"),
        (
            {"mu": np.array(["a"] * 4), "sigma": np.eye(4)},
            "mu must hold finite numbers; its type is <U1",
        ),
    ],
)
def test_unfitting_statistics_are_refused(tmp_path, network, statistics, message, monkeypatch):
    monkeypatch.setattr(fid, "extract", None)  # the refusal comes before any image is read
    np.savez(tmp_path / "reference.npz", **statistics)
    with pytest.raises(ValueError, match=message):
        score(write_npz(tmp_path / "a.npz", pictures(5)), tmp_path / "reference.npz", network)


def test_broken_samples_are_refused_before_the_reference_is_read(tmp_path, network, monkeypatch):
    folder = write_folder(tmp_path / "samples", pictures(4))
    (folder / "000.png").write_bytes((folder / "000.png").read_bytes()[:60])
    reference = write_npz(tmp_path / "reference.npz", pictures(5))
    monkeypatch.setattr(fid, "extract", None)
    with pytest.raises(ValueError, match=r"000\.png cannot be judged"):
        score(folder, reference, network)


def test_inception_score_of_files_and_folders(tmp_path, network, caplog, monkeypatch):
    """A file is scored in its order, a folder is shuffled first. The images are sorted by class, so
    in file order each part of the set holds one class.
    """
    monkeypatch.setattr(measures.inception_score, "__defaults__", (10,))
    images = np.zeros((40, 2, 2, 3), np.uint8)
    images[:20, ..., 0], images[20:, ..., 2] = 20, 20
    folder = write_folder(tmp_path / "images", images)
    with caplog.at_level(logging.WARNING):
        file = score(write_npz(tmp_path / "a.npz", images), folder, network)
    assert "seem sorted by class" in caplog.text
    assert "38 of 40 images are copies of others" in caplog.text
    assert file["samples"]["distinct"] == 2
    of_folder = score(folder, folder, network)
    orders = file["inception_score"]
    assert orders == {**of_folder["inception_score"], "reported_order": "file"}
    assert orders["file"]["mean"] == pytest.approx(1)
    assert orders["shuffled"]["mean"] > 1.1
    assert file["scores"]["inception_score"] == orders["file"]["mean"]
    assert of_folder["scores"]["inception_score"] == orders["shuffled"]["mean"]


def test_sets_of_other_sizes(tmp_path, network, caplog):
    """Photos that are not cropped are stretched; files that are not read are named."""
    squares = write_folder(tmp_path / "squares", pictures(6))
    others = write_folder(tmp_path / "others", pictures(6, seed=1))
    results = score(squares, others, network)
    assert results["samples"]["sizes"] == [[8, 8]] and not caplog.records
    photos = write_folder(tmp_path / "photos", pictures(6, side=12)[:, :9])
    (photos / "a.ppm").touch()
    results = score(squares, photos, network)
    assert results["reference"]["sizes"] == [[12, 9]]
    assert "samples of 8 x 8, reference of 12 x 9 px: every image is stretched" in caplog.text
    assert f"{photos}: 1 left out, such as a.ppm (format that is not read)" in caplog.text
    score(photos, photos, network)
    assert "samples of 12 x 9, reference of 12 x 9 px: every image is stretched" in caplog.text
    write_folder(photos, pictures(1, side=6), name="z.png")
    assert score(photos, photos, network)["samples"]["sizes"] == [[6, 6], [12, 9]]
    assert "reference of 6 x 6 to 12 x 9 px" in caplog.text
    caplog.clear()
    statistics = {"mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(tmp_path / "s.npz", **statistics)
    score(squares, tmp_path / "s.npz", network)
    assert not caplog.records
    score(photos, tmp_path / "s.npz", network)
    assert "samples of 6 x 6 to 12 x 9 px" in caplog.text and "reference of" not in caplog.text


def test_fewer_images_than_the_protocol(tmp_path, network, monkeypatch):
    path = write_npz(tmp_path / "a.npz", pictures(5))
    with pytest.raises(ValueError, match=r"holds 5 images, the protocol has 50,000.*--allow-fewer"):
        score(path, path, network, allow_fewer=False)
    assert score(path, path, network)["status"] == "PARTIAL: 5 images instead of 50,000"
    monkeypatch.setattr(fid, "PROTOCOL_IMAGES", 5)
    assert score(path, path, network, allow_fewer=False)["status"] == "complete"
    monkeypatch.setattr(fid, "PROTOCOL_IMAGES", 4)
    found = score(path, path, network, allow_fewer=False)
    assert found["status"] == "OTHER PROTOCOL: 5 images instead of 4"
    assert found["n"] == 5


def test_too_few_images_for_the_scores_are_refused(tmp_path, network):
    one, three = (write_npz(tmp_path / f"{n}.npz", pictures(n)) for n in (1, 3))
    four = write_npz(tmp_path / "4.npz", pictures(4))
    for samples, reference, least in ((one, four, "1.npz holds 1"), (four, three, "3.npz holds 3")):
        with pytest.raises(ValueError, match=f"{least} images; these scores need at least 4"):
            fid.check_inputs(samples, reference, allow_fewer=True)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"1.npz holds 1 images; these scores need at least 2"):
        fid.check_inputs(one, tmp_path / "statistics.npz", allow_fewer=True)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        measures.feature_statistics(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="more than 3 images in each set, got 3"):
        measures.compare_manifolds(torch.zeros(3, 4), torch.zeros(3, 4))


def test_the_block_size_does_not_change_the_manifolds(monkeypatch):
    reference, samples = normals(make_keys(1), 23, 6), normals(make_keys(2), 17, 6) + 1
    whole = measures.compare_manifolds(reference, samples)
    assert 0 < whole.precision < 1 and 0 < whole.recall < 1
    monkeypatch.setattr(measures, "_BLOCK", 5)
    parts = measures.compare_manifolds(reference, samples)
    for name in ("reference_radii", "sample_radii", "reference_inside", "sample_inside"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_full_precision_is_used_only_where_half_precision_overflows(monkeypatch):
    features = normals(make_keys(1), 8, 6)
    features[4:] += 300  # squared norms beyond 65,504
    single = measures.full_distances(features[:4], features[:4])
    assert not torch.equal(measures.official_distances(features[:4], features[:4]), single)
    whole = measures.official_distances(features, features)
    assert torch.equal(whole, measures.full_distances(features, features))


def test_statistics_in_blocks_of_rows(monkeypatch):
    features = normals(make_keys(1), 50, 6) + 100
    monkeypatch.setattr(measures, "_ROWS", 7)
    found = measures.feature_statistics(features)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().T), rtol=1e-9)


# -- weights and the program -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def random_network():
    return inception.load_inception("random")


def test_wrong_weights_are_refused(tmp_path, random_network, monkeypatch):
    network, digest = random_network
    assert digest == "random"
    path = tmp_path / inception.PUBLISHED.names[0]
    with pytest.raises(ValueError, match="does not exist"):
        inception.load_inception(path)
    counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(1)}
    torch.save(network.state_dict() | counter, path)
    with pytest.raises(
        ValueError, match=r"is not the published Inception network.*should begin with 6726825d"
    ):
        inception.load_inception(path)
    trusted = replace(inception.PUBLISHED, hashes=("",))
    monkeypatch.setattr(inception, "PUBLISHED", trusted)
    loaded, digest = inception.load_inception(tmp_path)  # the folder instead of the file
    assert len(digest) == 64
    assert torch.equal(loaded.fc.weight, network.fc.weight)
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"missing .*Conv2d_1a_3x3"):
        inception.load_inception(path)
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set.*Download https.*--inception-w"):
        inception.load_inception()
    (tmp_path / "cache" / "fid").mkdir(parents=True)
    path.rename(tmp_path / "cache" / "fid" / path.name)
    with pytest.raises(ValueError, match=r"cache.* does not fit Inception"):
        inception.load_inception()


def test_features_are_computed_without_tf32(monkeypatch):
    """On a GPU, TF32 would change them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed, layer = [], torch.nn.Linear(1, 1)
    layer.register_forward_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))

    class Network(torch.nn.Module):
        fc = layer

        def forward(self, x):
            return self.fc(x[..., :1])

    extract(Network(), pictures(1))
    assert allowed == [False]


def test_features_do_not_depend_on_other_images_sizes(random_network):
    network, _ = random_network
    images = [pictures(1, side=20)[0], pictures(1, seed=1, side=40)[0]]
    mixed = extract(network, images)
    for image, pool, spatial in zip(images, *mixed, strict=True):
        alone = extract(network, [image])
        torch.testing.assert_close(alone.pool[0], pool)
        torch.testing.assert_close(alone.spatial[0], spatial)


def test_the_program(tmp_path, network, monkeypatch, capsys):
    loaded = network, inception.RANDOM
    monkeypatch.setattr(inception, "load_inception", lambda *_: loaded)
    write_folder(tmp_path / "samples", pictures(4))
    write_folder(tmp_path / "reference", pictures(4, seed=1))
    arguments = ["--samples", "samples", "--reference", "reference", "--device", "cpu"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["fid.py", *arguments, *more])
        cli.run(program.main)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run()
    assert "error: samples holds 4 images, the protocol has 50,000" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
    run("--allow-fewer", "--out", "here/results.json")
    found = json.loads((tmp_path / "here" / "results.json").read_text())
    assert found["status"].startswith("PARTIAL: 4 images instead of 50,000; RANDOM WEIGHTS")
    assert set(found["scores"]) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert all(isinstance(value, float) for value in found["scores"].values())
    assert found["network"]["sha256"] == "random" and found["versions"]["torch"]
    assert found["samples"]["images"] == found["reference"]["images"] == found["n"] == 4
    printed = capsys.readouterr().out
    run("--allow-fewer", "--out", "here/results.json")  # the same sets: written again
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "text.npz").write_bytes(b"PK\x03\x04\xff")  # used to be reported as damaged
    for more, message in (
        (
            ("--reference", "samples"),
            f"holds the scores of {tmp_path}/samples against {tmp_path}/ref",
        ),
        (("--out", "notes.json"), "notes.json holds something other than scores; give another"),
        (("--out", "text.npz"), "text.npz holds something other than scores; give another"),
    ):
        with pytest.raises(SystemExit):
            run("--allow-fewer", "--out", "here/results.json", *more)
        assert message in capsys.readouterr().err
    write_folder(tmp_path / "elsewhere" / "samples", pictures(4, seed=2))
    write_folder(tmp_path / "elsewhere" / "reference", pictures(4, seed=3))
    monkeypatch.chdir(tmp_path / "elsewhere")  # here the same relative names are other images
    with pytest.raises(SystemExit):
        run("--allow-fewer", "--out", "../here/results.json")
    assert f"holds the scores of {tmp_path}/samples against" in capsys.readouterr().err
    assert "| 4 |" in printed and "PARTIAL" in printed and "wrote here/results.json" in printed


def test_the_reference_is_checked_before_weights_are_loaded(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path, pictures(4))
    arguments = ["--samples", str(tmp_path), "--reference", "none.npz", "--allow-fewer"]
    monkeypatch.setattr(sys, "argv", ["fid.py", *arguments])
    with pytest.raises(SystemExit):
        cli.run(program.main)
    assert "none.npz does not exist" in capsys.readouterr().err


def test_wrong_weights_leave_no_folder(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "a", pictures(4))
    images = str(tmp_path / "a")
    options = {"--samples": images, "--reference": images, "--inception-weights": "none"}
    options["--out"] = str(tmp_path / "new" / "results.json")
    arguments = [word for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["fid.py", *arguments, "--allow-fewer"])
    with pytest.raises(SystemExit):
        cli.run(program.main)
    assert "none does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_distances_are_not_negative():
    """The score of a set against itself used to be printed as -0.0000, because of rounding."""
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(3))
    for scale in (1.0, 10.0, 100.0, 1000.0):
        found = measures.feature_statistics(scale * features)
        assert not f"{measures.frechet_distance(found, found):.4f}".startswith("-")
