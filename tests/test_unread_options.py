"""Options that have no effect with the others are refused or pointed out, but never those that a
recipe sets itself.
"""

import logging
import sys
from dataclasses import replace

import numpy as np
import pytest

import t2i
from launch import export as export_program
from launch import generate
from launch import train_imagenet as imagenet_program
from launch.ablate import Ablation
from t2i import cli
from t2i.data.sources.pretokenized import LlamaGenCodes
from t2i.errors import UserError
from t2i.files import writable_folder
from t2i.model_options import DrawingModelOptions
from t2i.reward import reward_recipes
from t2i.sampling import SamplingConfig, SamplingOverrides
from t2i.training.check import check, look_at_model
from t2i.training.config import LabelledOptions
from t2i.training.recipes import recipe, recipes_for
from t2i.training.run_plan import about_settings, plan_run
from t2i.training.start import build_model
from t2i.training.unread_options import settle_options


def test_recipes_load_without_complaint(caplog):
    for _, own in recipes_for(LabelledOptions).values():
        assert settle_options(own, own) == own
        settle_options(replace(own, method=t2i.presets.base()), own)
    assert recipe("shapes-tuned", {"method.k": 1}).method.own_drafts == 0.5
    assert recipe("rar-b", {"data.source": ["m.jsonl"]}).data.crop_ranges == (1.1,)
    assert recipe("rar-b", {"data.views": "flip"}).data.crop_ranges == (1.1,)
    assert recipe("rar-b", {"data.crop_ranges": [1.2]}).data.crop_ranges == (1.2,)
    rate = {"optim.backbone_lr": 0.1}
    for tuning in ({}, {"tuning": "codec", "train_image_layers": True}):
        assert recipe("shapes-tuned", tuning | rate).optim.backbone_lr == 0.1
    assert not caplog.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data.views": "flip", "data.crop_ranges": [1.2]},
            r"data.crop_ranges=.* data.views=flip \(only ten-crop uses it\)",
        ),
        ({"data.source": ["m.jsonl"], "data.split": "val"}, "data.split=val has .* pretokenized"),
        ({"data.source": ["m.jsonl"], "data.crop_ranges": [1.2]}, "data.crop_ranges=.* pretok"),
    ],
)
def test_options_that_would_mean_another_run_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        recipe("rar-b", options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shapes-control", {"method.own_drafts": 1.0}, "method.own_drafts=1.0 has no effect with"),
        ("shapes-control", {"sampling.renoise": 0.5}, "renoise=0.5 has no effect with method.k=1"),
        (
            "shapes-tuned",
            {"method.k": 1, "optim.codec_lr": 0.1},
            "optim.codec_lr=0.1 has no effect",
        ),
        (
            "shapes-tuned",
            {"tuning": "codec", "optim.backbone_lr": 0.1},
            "optim.backbone_lr=0.1 has no effect with tuning=codec",
        ),
        (
            "shapes-tuned",
            {"method.k": 2, "method.slot_weights": [1.0, 0.5, 0.1]},
            "method.slot_weights=[1.0, 0.5, 0.1] has no effect with method.k=2 beyond its first 2",
        ),
        ("shapes-control", {"epochs": 3.0, "steps": 7}, "epochs=3.0 has no effect with steps=7"),
        ("shapes-tuned", {"log.project": "mine"}, "log.project=mine has no effect"),
        ("shapes-iclr2026", {"method.anneal": True}, "anneal=True has no effect with method.own"),
        (
            "shapes-iclr2026",
            {"method.noise": "gaussian", "method.schedule": "sine"},
            "method.schedule=sine has no effect with method.noise=gaussian",
        ),
        (
            "shapes-control",
            {"log.sample_every": 0, "log.prompts": ["a red circle"]},
            "log.prompts=['a red circle'] has no effect with log.sample_every=0",
        ),
    ],
)
def test_unread_options_give_a_warning(name, options, message, caplog):
    """Only a warning: scripts give the same options to every recipe."""
    assert recipe(name, options)
    assert message in caplog.text
    caplog.clear()
    assert recipe(name, {o: v for o, v in options.items() if o in ("method.k", "tuning", "steps")})
    assert not caplog.text


def test_options_of_steps_on_data_when_the_model_learns_from_its_own_images(caplog):
    """They used to be passed over without a word: such a run has no dropout."""
    own = reward_recipes.recipes()["shapes-janus-reward"][1]
    assert settle_options(own, own) == own and not caplog.text
    method = replace(own.method, k=4, own_drafts=0.5)
    settle_options(replace(own, token_dropout=0.2, method=method), own)
    assert "method.own_drafts=0.5, token_dropout=0.2 has no effect with reward fine" in caplog.text
    settle_options(replace(own, reward=replace(own.reward, prompts="a.txt", tasks=("x",))), own)
    assert "reward.tasks=['x'] has no effect with reward.prompts=a.txt, a file" in caplog.text
    caplog.clear()
    settle_options(replace(own, reward=replace(own.reward, tasks=("position",))), own)
    assert not caplog.text, "these are for the built-in prompts"
    settle_options(replace(own, reward=replace(own.reward, clip=0.1)), own)
    assert "reward.clip=0.1 has no effect with reward.updates=1" in caplog.text
    alone = replace(own.reward, watch=(), answerer="mplug", detector="shapes")
    settle_options(replace(own, reward=alone), own)
    assert "reward.answerer=mplug has no effect with reward.functions and watch" in caplog.text
    assert "reward.detector" not in caplog.text
    settle_options(replace(own, reward=replace(alone, watch_images=3)), own)
    assert "reward.watch_images=3 has no effect with an empty reward.watch" in caplog.text
    with pytest.raises(UserError, match=r"no effect with reward\.kl=0"):  # drew unguided after it
        replace(own.reward, start_cfg_scale=4.0, kl=0.0)
    unjudged = replace(alone, functions=(), start_cfg_scale=4.0, workers=2)
    settle_options(replace(own, reward=unjudged), own)
    assert "reward.workers=2 has no effect with empty reward.functions and" in caplog.text
    settle_options(replace(own, reward=replace(alone, functions=("dpg",))), own)
    assert "reward.detector=shapes has no effect with reward.functions and watch" in caplog.text


def test_epochs_alone_replace_the_recipes_steps(caplog):
    config = recipe("shapes-control", {"epochs": 2.0})
    assert (config.steps, config.epochs) == (None, 2)
    assert recipe("shapes-control", {"epochs": 2.0, "steps": 7}).steps == 7
    assert recipe("shapes-control").steps == 200


def test_on_the_command_line(monkeypatch, tmp_path):
    """LlamaGen's codes are not cut into views, and no split leaves any of them out."""
    (tmp_path / "imagenet256_codes").mkdir()
    arguments = ["llamagen-b-256", "--data.source", tmp_path, "--data.views", "flip", "--check"]
    monkeypatch.setattr(sys, "argv", ["p.py", *map(str, arguments)])
    with pytest.raises(UserError, match=r"data\.views=flip has no effect with pretokenized"):
        imagenet_program.main()


def test_codes_of_another_size_before_the_run(tmp_path):
    """--check gives the same error as the run does after it has loaded the model."""
    for part, values in (("codes", np.zeros((1, 2, 256), int)), ("labels", np.zeros(1, int))):
        (tmp_path / f"imagenet256_{part}").mkdir()
        for i in range(20):
            np.save(tmp_path / f"imagenet256_{part}" / f"{i}.npy", values)
    assert LlamaGenCodes(tmp_path).views == 2
    options = {"data.source": [str(tmp_path)], "run_dir": str(tmp_path / "run")}
    assert "20 x 2 views" in check(recipe("llamagen-b-256", options))
    with pytest.raises(UserError, match=r"256 x 1 codes .* backbone 576 x 1"):
        check(recipe("llamagen-b-384", options))


def test_a_part_that_does_not_learn():
    config = recipe("shapes-control", {"optim.backbone_lr": 0.0})
    warnings = list(about_settings(config, plan_run(config, 3000)))
    assert "optim.backbone_lr=0: the backbone does not learn" in warnings


def test_a_sheet_prompt_without_readable_text(tmp_path):
    options = {"data.source": "shapes:600", "run_dir": str(tmp_path / "run")}
    message = "log.prompts '\u7ea2' has no text the encoder can read"
    prompts = {"log.prompts": ["\u7ea2", "a red circle"]}
    assert message in check(recipe("shapes-control", options | prompts))
    assert "log.prompts" not in check(recipe("shapes-control", options))


def test_a_recipe_that_holds_out_more_than_there_is():
    """The number may be the recipe's, so the message names a value that always works."""
    with pytest.raises(
        UserError, match=r"validation_samples=256 .* --data\.validation-samples None"
    ):
        plan_run(recipe("shapes-control"), 12)
    config = recipe("shapes-control", {"data.validation_samples": None})
    assert plan_run(config, 12).held_out == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"seeds": (0, 0)}, r"seeds=\(0, 0\): give at least one seed"),
        ({"seeds": (-1,)}, "seed=-1 must be between"),
        ({"minutes": -1.0}, r"minutes=-1\.0 must not be negative"),
    ],
)
def test_an_empty_grid(options, message):
    """Refused at once, not only after the scenes have been encoded."""
    with pytest.raises(UserError, match=message):
        Ablation(**options).grid()


def test_a_tiny_ablation_keeps_what_is_given():
    """It used to take 2 steps whatever was given."""
    grid = Ablation(tiny=True, steps=5).grid()
    assert (grid.steps, grid.batch_size, grid.samples) == (5, 2, 1)


# -- drawing ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "own", "message"),
    [
        ({"cfg_power": 2.0, "cfg_scale": 1.0}, {}, "cfg_power=2.0 has no effect with cfg_scale=1"),
        ({"cfg_interval": 3}, {}, "cfg_interval=3 has no effect"),
        ({"temperature": 0.0, "top_p": 0.5}, {}, "top_p=0.5 has no effect with temperature=0"),
        ({"temperature": 0.0, "top_k": 0}, {"top_k": 9}, ""),
        ({"temperature": (0.0, 1.0), "top_k": 5}, {}, ""),
        ({"cfg_interval": 3}, {"cfg_scale": 2.0}, ""),
        ({"window": 1}, {"renoise": 0.5}, ""),
    ],
)
def test_sampling_options_without_effect_give_a_warning(given, own, message, caplog):
    overrides = SamplingOverrides(**given)
    overrides.look_for_unread(overrides.apply(SamplingConfig(**own)), drafts=False)
    assert message in caplog.text and bool(caplog.text) == bool(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": 1.0, "cfg_power": 2.0}, "cfg_power=2.0 has no effect with cfg_scale=1"),
        ({"temperature": 0.0, "top_k": 9}, "top_k=9 has no effect with temperature=0"),
        ({"window": 1, "renoise": 0.5}, "renoise=0.5 has no effect with k=1 (or --window 1)"),
        ({"renoise": 0.5, "cfg_power": 2.0}, ""),
    ],
)
def test_a_run_points_out_sampling_options_without_effect(options, message, tmp_path, caplog):
    """Only the programs that draw used to."""
    config = recipe("shapes-tuned", {"run_dir": str(tmp_path), "sampling": options})
    look_at_model(build_model(config, device="meta"), config)
    assert message in caplog.text and bool(caplog.text) == bool(message)


@pytest.mark.parametrize("given", [{"renoise": 0.5}, {"draft_temperature": 0.0}])
def test_draft_options_without_drafts(given, caplog):
    overrides, (name, value) = SamplingOverrides(**given), *given.items()
    settings = overrides.apply(SamplingConfig())
    overrides.look_for_unread(settings, drafts=True)
    assert not caplog.text
    overrides.look_for_unread(settings, drafts=False)
    assert f"{name}={value} has no effect with k=1" in caplog.text


def test_draft_options_for_some_of_several_models(plain, caplog):
    """A page of several models has one set of options, and those about drafts concern only some of
    the models.
    """
    options = DrawingModelOptions(
        ckpt=str(plain), sampling=SamplingOverrides(renoise=0.5, window=1)
    )
    model = options.load("cpu", "float32")
    assert options.drawing(model, among_others=True).sampling.renoise == 0.5
    assert not caplog.text
    options.drawing(model)
    assert "renoise=0.5 has no effect" in caplog.text


def draw(monkeypatch, plain, *arguments):
    prompts = ["--prompt", "a circle", "--ckpt", str(plain), "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *prompts, *map(str, arguments)])
    generate.main()


def test_greedy_samples_are_alike(monkeypatch, plain, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        draw(monkeypatch, plain, "--samples", 1, "--out", tmp_path / "1")
        assert "same image" not in caplog.text
        draw(monkeypatch, plain, "--samples", 2, "--out", tmp_path / "2")
    assert "temperature=0: all samples of a prompt, or class, are the same image" in caplog.text
    a, b = ((tmp_path / f"2/00000/samples/0000{i}.png").read_bytes() for i in (0, 1))
    assert a == b


def test_a_folder_with_other_images(monkeypatch, plain, tmp_path, caplog):
    """Sheets must not be written among the user's images (to train on, say), or they become part of
    the data.
    """
    (tmp_path / "mine.JPG").write_bytes(b"x")
    for _ in range(2):  # the second time, its own sheets are there
        draw(monkeypatch, plain, "--samples", 1, "--out", tmp_path)
    told = [message for message in caplog.messages if "holds other images" in message]
    assert len(told) == 1 and "(mine.JPG, ...)" in told[0]
    assert (tmp_path / "mine.JPG").read_bytes() == b"x"


def test_a_sheet_of_the_users_own_is_kept(monkeypatch, plain, tmp_path):
    """It used to be overwritten."""
    (tmp_path / "grid.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"grid\.png would be overwritten"):
        draw(monkeypatch, plain, "--samples", 1, "--out", tmp_path)
    assert (tmp_path / "grid.png").read_bytes() == b"x"


@pytest.mark.parametrize("folder", ["shapes", "shapes/images"])
def test_a_shipped_base_where_a_folder_has_its_name(monkeypatch, tmp_path, folder, caplog):
    """The folder used to be taken for an incomplete checkpoint."""
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    DrawingModelOptions(ckpt="shapes").check()
    assert "'shapes' is taken for the base that the kit ships; write './shapes'" in caplog.text
    with pytest.raises(UserError, match=r"\./shapes|shapes is not a complete"):
        DrawingModelOptions(ckpt="./shapes").check()


@pytest.mark.parametrize("name", ["grid.png", "images.NPY", "new/page.html"])
def test_a_folder_with_the_name_of_a_file(monkeypatch, plain, tmp_path, name):
    with pytest.raises(UserError, match="must be a folder, but has the name of a file"):
        draw(monkeypatch, plain, "--out", tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.zip").mkdir()  # some users have folders with such names
    assert writable_folder(tmp_path / "a.zip") == tmp_path / "a.zip"


# -- the command line ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private needs --push-to-hub"),
        (["--samples", "3"], "--samples needs a --prompt"),
    ],
)
def test_exports(monkeypatch, capsys, tmp_path, options, message):
    monkeypatch.setattr(sys, "argv", ["export.py", "--ckpt", "a", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit):
        export_program.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_prompts_that_begin_like_an_option(monkeypatch):
    for given in (["--prompt", "a", "-a red circle"], ["--prompt", "--a\tb"]):
        monkeypatch.setattr(sys, "argv", ["generate.py", *given])
        with pytest.raises(
            UserError, match=r"begins with '-', as options do: write --prompt='-.*--pro"
        ):
            cli.parse(generate.GenerateConfig, "")
    for word in ("- a red circle", "-5 degrees outside", "-1/2 cup"):  # not options
        monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", word])
        assert cli.parse(generate.GenerateConfig, "").prompt == (word,)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt=-a red circle", "--seed", "3"])
    config = cli.parse(generate.GenerateConfig, "")
    assert (config.prompt, config.seed) == (("-a red circle",), 3)
