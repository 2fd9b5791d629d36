"""Case 3: checkpoints that were damaged are refused by name (pickles in them: test_doors.py)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Killed, edited, folder_content
from runs import assert_same_weights, metrics, tiny_run, weights

import t2i
from t2i import checkpoint_folders, files
from t2i.errors import UserError
from t2i.manifest import write_manifest
from t2i.training.loop import train


def flip(path: Path, place: float = 0.5) -> None:
    """Flip a bit, by default in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


# -- 3: files that changed -------------------------------------------------------------------------
def test_every_file_is_listed_with_its_checksum(plain):
    listed = json.loads((plain / "manifest.json").read_text())["files"]
    content = folder_content(plain)
    assert listed.keys() == content.keys() - {"manifest.json"}
    assert any(name.startswith("training_state/") for name in listed)
    for name, entry in listed.items():
        assert entry == {
            "bytes": len(content[name]),
            "sha256": files.file_sha256(plain / name),
        }


def test_remains_of_a_killed_save_are_cleared_up(plain, copied, tiny_world):
    """A half-written checkpoint used to stay for good unless that step was saved again; the best
    model was lost if the kill fell between its two renames.
    """
    run_dir = copied(plain, "killed-in-save").parents[1]
    best = folder_content(run_dir / "best")
    (run_dir / "best").rename(run_dir / "best.t2i-old")
    for name in (
        "best.t2i-partial",
        "checkpoints/step_000002.t2i-partial",
        "checkpoints/step_000003.t2i-old",
    ):
        (run_dir / name).mkdir()
        (run_dir / name / "codec.safetensors").write_bytes(b"x")
    (run_dir / "metrics.jsonl.0123abcd.tmp").touch()
    train(tiny_run(tiny_world, run_dir.name, resume=True))
    assert folder_content(run_dir / "best") == best
    assert not [path for name in ("partial", "old", "tmp") for path in run_dir.rglob(f"*{name}")]


def test_a_kill_while_an_old_checkpoint_is_deleted(tiny_world, monkeypatch):
    """Half a checkpoint stayed, with its manifest, if the run was not to save again."""

    def half(folder, ignore_errors=False):
        if ignore_errors or "step_" not in str(folder):
            return remove(folder, ignore_errors)
        (folder / "codec.safetensors").unlink()
        raise Killed

    remove = shutil.rmtree
    changes = {"steps": 3, "log__save_every": 1, "log__keep_last": 2, "log__keep_best": False}
    config = tiny_run(tiny_world, "killed-in-deletion", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", half)
        train(config)
    train(replace(config, resume=True))
    kept = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert kept == ["step_000002", "step_000003"]


@pytest.mark.parametrize(
    "file", ["codec.safetensors", "backbone.safetensors", "config.json", "0*.safetensors"]
)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_flipped_bit_is_noticed(plain, copied, tiny_world, file, place):
    """Case 3: in any file, the training state included."""
    folder = copied(plain, f"flipped-{file.strip('*')}-{place}")
    path = next(folder.rglob(file))
    flip(path, place)
    with pytest.raises(UserError, match=f"no healthy checkpoint.*{path.name} is damaged"):
        train(tiny_run(tiny_world, folder.parents[1].name, resume=True))
    if file == "0*.safetensors":
        t2i.from_pretrained(folder)  # loading does not read it
        return
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        t2i.from_pretrained(folder)


def test_resume_skips_a_damaged_checkpoint(two_saved, tiny_world, caplog):
    """Case 3: to the newest healthy one, with a warning; the run then ends as it would have."""
    run_dir = shutil.copytree(two_saved, tiny_world / "runs" / "goes-back")
    first, last = checkpoint_folders.run_checkpoints(run_dir)
    expected = weights(last)
    flip(next((last / "training_state").iterdir()))
    assert train(tiny_run(tiny_world, run_dir.name, resume=True)) == last
    assert next((two_saved / "checkpoints").rglob("0*.safetensors")).name in caplog.text
    assert f"going back to {first}" in caplog.text
    assert_same_weights(weights(last), expected)
    assert [row["step"] for row in metrics(tiny_world, run_dir.name)] == [1, 2, 3]


def test_sampling_skips_a_damaged_checkpoint(two_saved, tmp_path, caplog):
    """Case 3: given a run folder; a damaged checkpoint folder given by name is refused."""
    run_dir = shutil.copytree(two_saved, tmp_path / "run")
    first, last = checkpoint_folders.run_checkpoints(run_dir)
    assert checkpoint_folders.find_checkpoint(run_dir) == last
    flip(last / "codec.safetensors")
    model = t2i.from_pretrained(run_dir)
    assert "codec.safetensors is damaged" in caplog.text and str(first) in caplog.text
    assert_same_weights(model.state_dict(), t2i.from_pretrained(first).state_dict())
    with pytest.raises(UserError, match=r"codec.safetensors is damaged"):
        t2i.from_pretrained(last)
    flip(first / "codec.safetensors")
    with pytest.raises(UserError, match="no healthy checkpoint"):
        t2i.from_pretrained(run_dir)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "null",
        '{"files": []}',
        '{"files": {}}',
        '{"files": {"config.json": "12"}}',
        '{"files": {"config.json": {"bytes": 12}}}',
        '{"files": {"config.json": {"bytes": true, "sha256": 3}}}',
        "",
        "\x00\x01",
    ],
)
def test_an_invalid_manifest(plain, tmp_path, content):
    """Case 3: an invalid manifest counts as damage."""
    folder = shutil.copytree(plain, tmp_path / "copy")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json.* copy the folder again"):
        t2i.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../config.json", "/etc/hostname", "adapter/../../x", "a\\b"])
def test_a_manifest_that_leads_outside(plain, tmp_path, name):
    """Case 3: paths outside the checkpoint are refused, whatever they hold."""
    folder = shutil.copytree(plain, tmp_path / "copy")
    with edited(folder / "manifest.json") as manifest:
        manifest["files"][name] = 1
    with pytest.raises(UserError, match="is not within the folder"):
        t2i.from_pretrained(folder)


def test_a_link_that_leads_outside(plain, tmp_path):
    """Case 3: links are refused, except for those that the hub's cache consists of."""
    folder = shutil.copytree(plain, tmp_path / "copy")
    (folder / "codec.safetensors").rename(tmp_path / "codec")
    (folder / "codec.safetensors").symlink_to(tmp_path / "codec")
    with pytest.raises(UserError, match=r"codec.safetensors is not within the checkpoint folder"):
        t2i.from_pretrained(folder)
    snapshot = tmp_path / "models--o--n" / "snapshots" / "1f"
    shutil.copytree(plain, snapshot)
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    (snapshot / "codec.safetensors").rename(blobs / "2e")
    (snapshot / "codec.safetensors").symlink_to("../../blobs/2e")
    t2i.from_pretrained(snapshot)


def test_a_file_that_is_not_listed_is_not_read(plain, tmp_path):
    """Case 3: weights that the manifest does not list."""
    folder = shutil.copytree(plain, tmp_path / "copy")
    with edited(folder / "manifest.json") as manifest:
        del manifest["files"]["codec.safetensors"]
    with pytest.raises(UserError, match=r"codec.safetensors is not in the manifest"):
        t2i.from_pretrained(folder)
    folder = shutil.copytree(plain, tmp_path / "another")
    (folder / "training_state" / "more.pt").touch()
    checkpoint_folders.read_config(folder, contents=True)
    with pytest.raises(UserError, match=r"more.pt is not in the manifest"):
        checkpoint_folders.read_config(folder, with_state=True)


@pytest.mark.parametrize("content", ["[]", "{}", '{"tuning": "full", "backbone": 3}', "{"])
def test_an_invalid_config(plain, tmp_path, content):
    """Case 3: an invalid config.json is refused, even if the manifest matches it."""
    folder = shutil.copytree(plain, tmp_path / "copy")
    (folder / "config.json").write_text(content)
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(UserError, match=r"config.json is not a checkpoint's config.json"):
        t2i.from_pretrained(folder)


def test_manifests_of_older_versions_are_read_with_a_warning(plain, copied, tiny_world, caplog):
    """Case 3: they have no checksums."""
    folder = copied(plain)
    with edited(folder / "manifest.json") as manifest:
        manifest["files"] = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert train(tiny_run(tiny_world, folder.parents[1].name, resume=True)) == folder
    assert f"{folder} has no checksums" in caplog.text
