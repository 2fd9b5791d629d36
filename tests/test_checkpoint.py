"""Checkpoint folders: complete or refused, found, moved, and readable by PEFT."""

import os
import shutil

import pytest
import torch
from helpers import edited
from runs import PROMPTS, assert_same_weights, tiny_run

import t2i
from t2i import checkpoint_folders
from t2i.errors import UserError
from t2i.manifest import write_manifest
from t2i.training.loop import train


def test_incomplete_folders_are_refused(tiny_world, plain, tmp_path):
    def damaged(message: str, damage) -> None:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(plain, folder)
        damage(folder)
        with pytest.raises(ValueError, match=message):
            t2i.from_pretrained(folder)

    def cut(name):
        return lambda folder: os.truncate(folder / name, 100)

    damaged("manifest.json is missing", lambda folder: (folder / "manifest.json").unlink())
    damaged("damaged or not JSON", cut("manifest.json"))
    damaged("codec.safetensors is missing or does not have", cut("codec.safetensors"))
    damaged("backbone.safetensors is missing", lambda f: (f / "backbone.safetensors").unlink())
    with pytest.raises(ValueError, match="does not exist"):
        t2i.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="that is a shipped base, but a trained model is needed"):
        checkpoint_folders.read_config("shapes")


def test_settings_of_another_version_are_refused(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "later")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"noise_floor"', '"noise_roof"'))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(ValueError, match="does not know: noise_roof; load it with the version"):
        t2i.from_pretrained(folder)


def test_a_finished_model_needs_no_training_state(tiny_world, plain):
    folder = tiny_world / "runs" / "slim" / "checkpoints" / plain.name
    shutil.copytree(plain, folder)
    shutil.rmtree(folder / "training_state")
    assert_same_weights(
        t2i.from_pretrained(folder).state_dict(), t2i.from_pretrained(plain).state_dict()
    )
    with pytest.raises(ValueError, match=r"state is missing, .* --backbone\.weights"):
        train(tiny_run(tiny_world, "slim", resume=True))


def test_a_checkpoint_trained_with_a_stride_is_refused(plain, tmp_path):
    """Such checkpoints are older than strides as an option for drawing; with stride 1 they load."""
    folder = shutil.copytree(plain, tmp_path / "earlier")
    for stride in (1, 2):
        with edited(folder / "config.json") as config:
            config["method"]["stride"] = stride
        (folder / "manifest.json").unlink()
        write_manifest(folder)
        if stride == 1:
            assert t2i.from_pretrained(folder).config == t2i.from_pretrained(plain).config
    for read in (t2i.from_pretrained, checkpoint_folders.read_config):
        with pytest.raises(UserError, match=r"trained with method.stride=2 .* draw with --stride"):
            read(folder)


def test_complete_checkpoints_are_found_in_order(tmp_path):
    for name in (
        "step_000100",
        "step_999999",
        "step_1000000",
        "step_1000001.t2i-partial",
        "step_1000000.t2i-old",
    ):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step_2000000").mkdir()
    names = [folder.name for folder in checkpoint_folders.run_checkpoints(tmp_path)]
    assert names == ["step_000100", "step_999999", "step_1000000"]


def test_only_the_newest_checkpoints_are_kept(tiny_world):
    train(tiny_run(tiny_world, "kept", steps=4, log__save_every=1, log__keep_last=2))
    found = checkpoint_folders.run_checkpoints(tiny_world / "runs" / "kept")
    assert [f.name for f in found] == ["step_000003", "step_000004"]


def test_a_changed_or_missing_base_is_refused(tiny_world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_world / "base", base)
    folder = train(tiny_run(tiny_world, "moved", tuning="codec", backbone__weights=str(base)))
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"that are gone: .*--base\.weights PATH"):
        t2i.from_pretrained(folder)
    assert t2i.from_pretrained(folder, base=tmp_path / "elsewhere").backbone.tokenizer is not None
    content = torch.load(tmp_path / "elsewhere" / "gpt.pt", weights_only=True)
    content["model"]["norm.weight"] += 1
    torch.save(content, tmp_path / "elsewhere" / "gpt.pt")
    with pytest.raises(ValueError, match="not the weight file that the checkpoint was trained on"):
        t2i.from_pretrained(folder, base=tmp_path / "elsewhere")


def test_peft_loads_the_adapter_folder(tiny_world):
    from peft import PeftModel

    folder = train(tiny_run(tiny_world, "peft", tuning="lora"))
    ours = t2i.from_pretrained(folder).backbone
    base = t2i.load_backbone("llamagen", tiny_world / "base")
    prepared = base.prepare(PROMPTS)
    x = base.embed_tokens(torch.arange(16).view(1, 16, 1)).detach()

    def output(backbone):
        condition = backbone.encode_condition({k: v[:1] for k, v in prepared.items()})
        x_with_prefix = torch.cat([condition.prefix, x], dim=1)
        return backbone.trunk(x_with_prefix, torch.arange(x_with_prefix.shape[1]), condition)

    plain_output = output(base)
    theirs = PeftModel.from_pretrained(base, folder / "adapter").base_model.model
    assert torch.equal(output(ours), output(theirs))
    assert not torch.allclose(output(ours), plain_output, atol=1e-3)
