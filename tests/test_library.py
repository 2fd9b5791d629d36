"""Case 24: the library as used in a notebook: names, error messages, reprs, devices, scores."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_llamagen, tiny_open_magvit2, tiny_rar
from peft import LoraConfig as PeftSettings
from peft import PeftModel, inject_adapter_in_model
from PIL import Image

import geneval
import t2i
from dpg_bench.answerers import answer_prompt, load_answerer
from dpg_bench.dpg_benchmark import DPGBench, load_questions
from dpg_bench.questions import QuestionGraph
from dpg_bench.score import score as dpg_score
from geneval.geneval_benchmark import GenEval, load_prompts
from geneval.prompts import official_prompts
from t2i import generation, loading
from t2i.evaluation.evaluation_options import Scope
from t2i.evaluation.fid.fid_score import check_inputs
from t2i.evaluation.fid.inception import load_inception
from t2i.evaluation.generation_folder import sample_file, write_prompt
from t2i.evaluation.runner import evaluate
from t2i.imaging import save_png
from t2i.loading import pick_device
from t2i.lora import add_lora, load_adapter, merge_lora, save_adapter
from t2i.reward.reward_options import RewardOptions
from t2i.sampling import DrawOptions
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.sources import ASSETS
from t2i.tensorar import sampler
from t2i.training.config import (
    BackboneOptions,
    DataOptions,
    EngineOptions,
    LabelledOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)
from t2i.training.engine import start_processes
from t2i.tuning import LoRAConfig


@pytest.fixture(scope="module")
def model():
    return t2i.attach(tiny_llamagen("class"), t2i.presets.iclr2026(k=3))


def test_every_public_name_is_listed_and_exists():
    assert set(t2i.__all__) <= set(dir(t2i)) and "__version__" in dir(t2i)
    assert all(getattr(t2i, name) is not None for name in t2i.__all__)
    for name in ("generate", "from_pretrained", "load_model", "load_backbone", "attach", "grid"):
        signature = inspect.signature(getattr(t2i, name))
        for parameter in signature.parameters.values():
            assert parameter.kind is not parameter.VAR_KEYWORD
            assert parameter.annotation is not parameter.empty, (name, parameter)
    with pytest.raises(AttributeError, match="it offers load_backbone"):
        t2i.nothing  # noqa: B018


def test_warnings_of_partly_read_prompts_are_limited(caplog):
    backbone = t2i.load_backbone("llamagen", "shapes")
    most = generation._MOST_WARNINGS
    prompts = [f"a red circle zebra{i}" for i in range(most + 5)]
    for start in range(0, len(prompts), 4):  # batch by batch
        generation._warn_of_prompts(backbone, prompts[start : start + 4])
    generation._warn_of_prompts(backbone, ["\u7ea2", *prompts])
    said = [record.getMessage() for record in caplog.records]
    assert sum("the encoder does not know" in line for line in said) == most
    assert said[most:] == [
        "further prompts that are only read in part are not listed",
        "prompt '\u7ea2': has no text the encoder can read",
    ]


def test_an_unknown_argument_names_the_called_function(model):
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'typo'"):
        t2i.generate(model, [1], typo=1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("runs/mine", [1]), {}, "generate needs a model, but got 'runs/mine'"),
        ((None, 3), {}, "prompts must be a list, but are 3: generate"),
        ((None, "a dog"), {}, "prompts must be a list, but are 'a dog': generate"),
        ((None, {1, 2}), {}, r"prompts must be a list, but are \{1, 2\}: generate\(model, \[207\]"),
        ((None, {"a dog": 1}), {}, "prompts must be a list"),
        ((None, None), {}, "prompts must be a list, but are None"),
        ((None, torch.tensor(3)), {}, r"prompts must be a list, but are tensor\(3\)"),
        ((None, np.ones((2, 1), int)), {}, "prompts must be a list, but are array"),
        ((None, [1]), {"batch_size": "4"}, "batch_size='4' must be a whole number"),
        ((None, [1]), {"sampling": {"top_k": 3}}, "sampling is .*give a t2i.SamplingConfig"),
        ((None, [1]), {"seed": "3"}, "seed='3' must be a whole number"),
        ((None, [1]), {"samples_per_prompt": 0}, "must be at least 1"),
        ((None, [1]), {"samples_per_prompt": None}, "samples_per_prompt=None must be a whole"),
        ((None, [77]), {}, "class label 77 at position 0"),
        ((None, ["1"]), {}, "class label '1' at position 0"),
    ],
)
def test_generate_refuses_bad_arguments(model, arguments, options, message):
    given, prompts = arguments
    with pytest.raises(t2i.UserError, match=message):
        t2i.generate(given or model, prompts, progress=False, **options)


class Column:
    """Like a sorted pandas column: indexed by labels that are not positions."""

    def __init__(self, values, labels):
        self._by_label = dict(zip(labels, values, strict=True))

    def __len__(self):
        return len(self._by_label)

    def __iter__(self):
        return iter(self._by_label.values())

    def __getitem__(self, label):
        return self._by_label[label]


def test_any_ordered_prompts_draw_the_same_as_a_list(model):
    def draw(prompts, **options):
        return [np.asarray(i) for i in t2i.generate(model, prompts, progress=False, **options)]

    wanted = draw([3, 1])
    for given in (np.array([3, 1]), (n for n in [3, 1]), Column([3, 1], labels=[1, 0])):
        assert np.array_equal(draw(given), wanted)
    assert np.array_equal(draw([3, 1], seed=np.int64(0), batch_size=np.int32(16)), wanted)


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 1.5},
        {"top_k": True},
        {"cfg_scale": "7"},
        {"cfg_scale": (1.0, None)},
        {"temperature": None},
        {"cfg_interval": 1.5},
        {"window": 2.5},
    ],
)
def test_sampling_settings_of_a_wrong_type_are_refused(setting):
    (name,) = setting
    with pytest.raises(t2i.UserError, match=f"^{name}=.* must be a (whole|finite) number"):
        t2i.SamplingConfig(**setting)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: OptimOptions(codec_lr="1e-3"),
            "optim.codec_lr is '1e-3', which is not of the type",
        ),
        (lambda: OptimOptions(betas=0.9), "optim.betas is 0.9, which is not of the type"),
        (lambda: EngineOptions(precision="fp16"), "engine.precision is 'fp16', which is not of"),
        (lambda: LogOptions(prompts="a circle"), "log.prompts is 'a circle', which is not of"),
        (
            lambda: LogOptions(keep_best="no"),
            "log.keep_best is 'no', which is not of the type bool",
        ),
        (lambda: EngineOptions(zero_stage=True), "engine.zero_stage is True, which is not of"),
        (lambda: DataOptions(trigger=float("nan")), "data.trigger is nan, which is not of the"),
        (
            lambda: LabelledOptions(source=np.array(["a", "b"])),
            "data.source is array.*, which is not",
        ),
        (lambda: DataOptions(trigger=3), "data.trigger is 3, which is not of the type"),
        (lambda: BackboneOptions(grid=16), "backbone.grid is 16, which is not of the type"),
        (lambda: LoRAConfig(rank=None), "lora.rank is None, which is not of the type int"),
        (lambda: TrainConfig(epochs="3"), "epochs is '3', which is not of the type float"),
        (lambda: TrainConfig(tuning="LoRA"), "tuning is 'LoRA', which is not of the type"),
        (lambda: TrainConfig(engine=None), "engine is None, which is not of the type Engine"),
        (lambda: RewardOptions(functions=None), "reward.functions is None, which is not of"),
        (
            lambda: Scope(allow_incomplete="no"),
            "allow_incomplete is 'no', which is not of the type",
        ),
        (lambda: DrawOptions(speed="fast"), "speed is 'fast', which is not of the type"),
        (lambda: DrawOptions(size=64), "size is 64, which is not of the type"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(make, message):
    """They used to pass, to fail or be misread later, or to end in a TypeError."""
    with pytest.raises(t2i.UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_questions(None), "name is None: give a path or a name"),
        (lambda: load_prompts(["official"]), r"name is \['official'\]: give a path or a name"),
        (lambda: load_answerer(["mplug"]), r"unknown judge \['mplug'\]"),
        (lambda: DPGBench("shapes", load_answerer("shapes")), "graph is 'shapes': give .*load_q"),
        (lambda: DPGBench(load_questions("shapes"), "mplug"), "answerer is 'mplug': give a loaded"),
        (lambda: answer_prompt("mplug", [], []), "answerer is 'mplug': give a loaded one"),
        (lambda: answer_prompt(load_answerer("shapes"), 3, []), "needs a list of PIL images, but"),
        (
            lambda: answer_prompt(load_answerer("shapes"), [Image.new("RGB", (8, 8))], ["red?"]),
            r"questions is \['red\?'\]: give those of an item",
        ),
        (lambda: GenEval(None, ShapesDetector()), "entries is None: give a list of GenE"),
        (lambda: evaluate("geneval", "out", images="x"), "benchmark is 'geneval': give a GenEval"),
        (lambda: load_inception(3), "weights is 3: give a path or a name"),
        (lambda: load_inception("random", device="gpu"), "device 'gpu' must be auto, cpu or cuda"),
    ],
)
def test_evaluators_refuse_arguments_of_a_wrong_type(call, message):
    with pytest.raises(t2i.UserError, match=message):
        call()


def test_settings_take_what_means_the_same():
    assert BackboneOptions(weights=Path("a/b")) == BackboneOptions(weights="a/b")
    assert TrainConfig(run_dir="runs/x") == TrainConfig(run_dir=Path("runs/x"))
    assert LogOptions(prompts=["a"]) == LogOptions(prompts=("a",))
    assert OptimOptions(codec_lr=np.float64(0.5), warmup_steps=np.int64(3)) == OptimOptions(
        codec_lr=0.5, warmup_steps=3
    )
    given = {"steps": np.int64(3), "optim": {"codec_lr": np.float32(0.5)}}
    assert t2i.recipe("shapes-tuned", given) == t2i.recipe(
        "shapes-tuned", {"steps": 3, "optim.codec_lr": 0.5}
    )


def test_numpy_numbers_in_settings_can_be_stored():
    method = t2i.presets.tuned(k=np.int64(4), own_drafts=np.float32(0.5))
    assert method == t2i.presets.tuned() and json.dumps(vars(method))
    config = t2i.SamplingConfig(
        cfg_scale=np.float32(2), top_k=[np.int64(3), 4], top_p=np.float64(1)
    )
    assert json.loads(json.dumps(vars(config)))["top_k"] == [3, 4]


def test_generate_refuses_a_model_in_training_mode_or_with_other_sampling():
    model = t2i.attach(tiny_llamagen("class"), t2i.presets.base())
    model.sampling = {"top_k": 3}
    with pytest.raises(t2i.UserError, match=r"model.sampling is .*: set a t2i.SamplingConfig"):
        t2i.generate(model, [1], progress=False)
    with pytest.raises(t2i.UserError, match=r"training mode.*call model.eval\(\) first"):
        t2i.generate(model.train(), [1], progress=False)


@pytest.mark.parametrize("make", [lambda: tiny_llamagen("class"), tiny_open_magvit2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_do_not_depend_on_torchs_default_dtype(make, dtype):
    """The code of other models, such as DeepSeek's, sets it."""
    model = t2i.attach(make(), t2i.presets.iclr2026(k=2))
    sampling = t2i.SamplingConfig(cfg_scale=2.3)
    table = sampler.guidance_table(model, sampling)
    (wanted,) = t2i.generate(model, [3], sampling=sampling, progress=False)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(sampler.guidance_table(model, sampling), table)
        (found,) = t2i.generate(model, [3], sampling=sampling, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_called_that(model, wrap):
    with pytest.raises(
        t2i.UserError, match=r"the model itself, which is inside of this (Opt|DataPar)"
    ):
        t2i.generate(wrap(model), [1])


def test_adapters_are_not_lost_when_a_model_is_saved(tmp_path):
    """A checkpoint of the whole model held the weights without them, and drew other images."""
    backbone = t2i.load_backbone("llamagen", "shapes")
    model = t2i.attach(backbone, t2i.presets.iclr2026(k=2))
    with pytest.raises(t2i.UserError, match=r"and this model has none of these: add .*merge_lora"):
        t2i.save_pretrained(model, tmp_path / "a", tuning="lora")
    adapters = PeftSettings(r=2, target_modules=["wqkv", "wo"], init_lora_weights=False)
    inject_adapter_in_model(adapters, backbone)
    drawn = t2i.generate(model, ["a red circle"], progress=False)
    for tuning, words in (("full", "tuning='full' would leave"), ("lora", "this model has none")):
        with pytest.raises(t2i.UserError, match=words):
            t2i.save_pretrained(model, tmp_path / "a", tuning=tuning)
    assert not (tmp_path / "a").exists()
    merge_lora(backbone)
    saved = t2i.from_pretrained(t2i.save_pretrained(model, tmp_path / "a", tuning="full"))
    again = t2i.generate(saved, ["a red circle"], progress=False)
    assert np.abs(np.asarray(again[0], int) - np.asarray(drawn[0], int)).mean() < 1


def test_generate_refuses_a_backbone_and_labels_for_captions():
    with pytest.raises(t2i.UserError, match=r"t2i.attach\(backbone, t2i.presets.base\(\)\)"):
        t2i.generate(tiny_rar(), [1])
    captions = t2i.attach(tiny_llamagen("text"), t2i.presets.base())
    with pytest.raises(t2i.UserError, match=r"prompts\[1\] is 7: this model draws captions"):
        t2i.generate(captions, ["a dog", 7])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t2i.attach("shapes", t2i.presets.base()), "attach needs a backbone"),
        (lambda: t2i.attach(tiny_rar(), "iclr2026"), "config is 'iclr2026'.*t2i.presets"),
        (lambda: t2i.attach(tiny_rar(), t2i.presets.iclr2026), "config is .*t2i.presets"),
        (lambda: t2i.attach(tiny_rar(), t2i.presets.base(), seed="x"), "seed='x' must be a whole"),
        (lambda: t2i.presets.iclr2026(k="4"), "k is '4', which is not of the type int"),
        (lambda: t2i.presets.tuned(mlp="no"), "mlp is 'no', which is not of the type bool"),
        (lambda: t2i.presets.tuned(slot_weights=3), "slot_weights is 3, which is not of the type"),
        (lambda: t2i.presets.tuned(own_drafts="all"), "own_drafts is 'all', which is not of"),
        (lambda: t2i.load_backbone("shapes", "shapes"), "unknown backbone family 'shapes'"),
        (lambda: t2i.load_backbone("rar", "shapes"), "holds a llamagen backbone, not rar"),
        (lambda: t2i.load_backbone("rar", "shapes-janus"), "holds a janus backbone, not rar"),
        (lambda: t2i.load_backbone("rar", ASSETS / "shapes-janus/model"), "a janus backbone, not"),
        (lambda: t2i.load_backbone("rar", "shapes", config={"dim": 3}), "config .*RARConfig"),
        (lambda: t2i.load_backbone("rar", "shapes", config=(16,)), r"or a grid .*is \(16,\)"),
        (lambda: t2i.from_pretrained("shapes"), "does not exist"),
        (lambda: t2i.from_pretrained("owner/name"), "exist; one on the hub is fetched first"),
        (lambda: t2i.from_pretrained(None), "folder is None: give a path or a name"),
        (lambda: t2i.load_model(None), "source is None: give a path or a name"),
        (lambda: t2i.load_backbone("rar", 3), "source is 3: give a path or a name"),
        (lambda: t2i.load_model("shapes", dtype=torch.int8), "dtype torch.int8 holds no weights"),
        (
            lambda: t2i.load_model("shapes", dtype=["bfloat16"]),
            r"dtype \['bfloat16'\] must be auto",
        ),
        (lambda: t2i.load_model("a\0b"), r"source is 'a\\x00b': give a path or a name"),
        (lambda: t2i.load_model("\ud83d"), "give a path or a name"),
        (
            lambda: t2i.from_pretrained("a/" + "b" * 256),
            r"folder is 'a/bb\w+: give a path or a name",
        ),
        (lambda: t2i.from_pretrained(""), "folder is '': give a path or a name"),
        (lambda: t2i.from_pretrained("x", base=""), "base is '': give a path or a name"),
        (lambda: t2i.load_model("shapes", tokenizer=Image), "tokenizer is <module .*give a path"),
        (lambda: t2i.load_backbone("rar", "x", text_encoder=[3]), "text_encoder is .*give a path"),
        (lambda: t2i.load_backbone(["rar"], "shapes"), r"unknown backbone family \['rar'\]"),
        (lambda: t2i.attach(tiny_rar(), t2i.presets.base(), seed=2**70), "seed=.* must be between"),
        (lambda: t2i.recipe(["shapes-tuned"]), "unknown recipe"),
        (lambda: t2i.recipe("shapes-tuned", ["steps"]), r"options is \['steps'\]: give a mapping"),
        (lambda: t2i.check(t2i.recipe("shapes-tuned"), world_size=0), "world_size=0 must be at"),
    ],
)
def test_loaders_refuse_bad_arguments(call, message):
    with pytest.raises(t2i.UserError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "runs/mine"}, "model is 'runs/mine', which is not of the type TensorAR"),
        ({"folder": None}, "folder is None: give a path or a name"),
        ({"folder": ""}, "folder is '': give a path or a name"),
        ({"tuning": "Full"}, "tuning is 'Full', which is not of the type"),
        ({"tuning": ["full"]}, r"tuning is \['full'\], which is not of the type"),
        ({"image_layers": "yes"}, "image_layers is 'yes', which is not of the type bool"),
        ({"sampling": {"top_k": 3}}, "sampling is .*, which is not of the type"),
        ({"training": [3]}, r"training is \[3\], which is not of the type"),
        ({"training": {"x": object()}}, "training holds what JSON cannot: Object of type object"),
        ({"training": {"x": "\ud83d"}}, "training holds what JSON cannot"),
    ],
)
def test_a_checkpoint_with_bad_arguments_is_not_written(tmp_path, change, message):
    """A mistyped `tuning` used to write a checkpoint that lacked the trained weights."""
    model = t2i.attach(t2i.load_backbone("llamagen", "shapes"), t2i.presets.base())
    arguments = {"model": model, "folder": tmp_path / "ckpt", "tuning": "full"} | change
    with pytest.raises(t2i.UserError, match=message):
        t2i.save_pretrained(**arguments)
    assert not list(tmp_path.iterdir())


def test_repr_describes_a_model_in_one_line(model, monkeypatch):
    codec, gpt = (
        sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.codec, model.backbone)
    )
    assert repr(model) == (
        f"TensorAR(k=3, codec {codec:.3g} M, trained: nothing yet, "
        f"LlamaGen(class, {gpt:.3g} M, 4 x 4 codes, float32 on cpu))"
    )
    monkeypatch.setattr(model, "sampling", replace(model.sampling, stride=2))
    assert repr(model).startswith("TensorAR(k=3, stride=2, codec ")
    backbone = tiny_rar()
    add_lora(backbone, LoRAConfig(rank=2))
    assert "\n" not in repr(backbone) and len(repr(backbone)) < 120
    assert repr(backbone).startswith("RAR(class, ") and "k=1, the base model" in repr(
        t2i.attach(backbone, t2i.presets.base())
    )


@pytest.mark.parametrize("make", [lambda: tiny_llamagen("class"), tiny_rar, tiny_open_magvit2])
def test_peft_loads_adapters_with_image_layers(make, tmp_path):
    """Case 9. Janus adapters on transformers' own model are tested in test_janus_training.py."""
    ours, theirs = make(), make()
    add_lora(ours, LoRAConfig(rank=2))
    codes = torch.arange(8).view(2, 4, 1).expand(-1, -1, len(ours.spec.subvocabs))

    @torch.no_grad()
    def logits(backbone):
        condition = backbone.encode_condition(backbone.prepare([1, 2]))
        x = torch.cat([condition.prefix, backbone.embed_tokens(codes)], dim=1)
        h = backbone.trunk(x, torch.arange(x.shape[1]), condition)
        return backbone.next_logits(h, codes[:, :1, :0].expand(-1, h.shape[1], -1))

    with torch.no_grad():
        for layer in ours.image_layers().values():
            layer.requires_grad_(True)
        for parameter in ours.parameters():
            parameter.add_(0.05 * parameter.requires_grad)
    plain = logits(theirs)
    save_adapter(ours, tmp_path, image_layers=True)
    loaded = PeftModel.from_pretrained(theirs, tmp_path).base_model.model
    assert torch.equal(logits(loaded), logits(ours)) and not torch.allclose(logits(ours), plain)
    (tmp_path / "adapter_config.json").write_text('{"r": "2"')
    with pytest.raises(t2i.UserError, match=r"adapter_config.json is damaged or not JSON"):
        load_adapter(make(), tmp_path)


def test_repr_of_a_checkpoint_says_what_was_trained(shapes_ckpt):
    text = repr(t2i.from_pretrained(shapes_ckpt))
    assert "k=4" in text and "trained: codec" in text and "\n" not in text and len(text) < 200


# -- device and dtype ------------------------------------------------------------------------------
def test_the_machine_decides_device_and_dtype(monkeypatch):
    assert pick_device() == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bfloat16") == pick_device(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    assert pick_device() == (torch.device("cuda"), torch.bfloat16)
    assert pick_device("cuda:1", "float32") == (torch.device("cuda:1"), torch.float32)
    with pytest.raises(t2i.UserError, match=r"PyTorch found 2 GPU\(s\), numbered from cuda:0"):
        pick_device("cuda:2")
    placed = {}
    monkeypatch.setattr(loading, "load_source", lambda source, **k: placed.update(k))
    t2i.load_backbone("llamagen", "shapes")
    assert placed["device"] == torch.device("cuda") and placed["dtype"] == torch.bfloat16


def test_a_missing_gpu_is_reported(monkeypatch):
    """Case 28: the message says that no GPU was found, not just which values are allowed."""
    with pytest.raises(t2i.UserError, match="PyTorch found no GPU on this machine"):
        pick_device("cuda")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(t2i.UserError, match="needs a driver for CUDA 13 or newer"):
        pick_device("cuda")
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(t2i.UserError, match="built for CPUs only"):
        t2i.load_model("shapes", device="cuda")
    for wrong in ("gpu", "cuda:x", "0"):
        with pytest.raises(t2i.UserError, match="must be auto, cpu or cuda"):
            pick_device(wrong)
    with pytest.raises(t2i.UserError, match="dtype 'half' must be auto"):
        pick_device("cpu", "half")


def test_cards_that_pytorch_cannot_use_are_pointed_out(tmp_path, monkeypatch, caplog):
    """A driver older than PyTorch's CUDA: everything ran on the CPU without a word."""
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(loading, "_CARDS", tmp_path)
    loading._warn_of_idle_cards.cache_clear()
    assert pick_device()[0].type == "cpu" and not caplog.messages  # CUDA_VISIBLE_DEVICES is set
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for _ in range(2):
        assert pick_device()[0].type == "cpu"
    (message,) = caplog.messages
    assert message.startswith("this machine has 1 NVIDIA card(s), but the CPU is used")
    loading._warn_of_idle_cards.cache_clear()
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert start_processes().device.type == "cpu" and caplog.messages == [message] * 2


def test_cards_without_bfloat16_are_pointed_out(monkeypatch, caplog):
    """V100 and T4: PyTorch emulates it."""
    answers = {"is_available": True, "device_count": 1, "get_device_name": "Tesla T4"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    loading.warn_of_emulation.cache_clear()
    assert pick_device(dtype="float32")[1] == torch.float32 and not caplog.messages
    for _ in range(2):
        assert pick_device()[1] == torch.bfloat16
    (message,) = caplog.messages
    assert message.startswith("Tesla T4 computes bfloat16 by emulation") and "fp32" in message
    loading.warn_of_emulation.cache_clear()


# -- pictures --------------------------------------------------------------------------------------
def test_grid_makes_a_sheet_and_refuses_bad_arguments():
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    sheet = t2i.grid(images, cell=128)
    assert sheet.size == (2 * 134 + 6, 2 * 134 + 6) and sheet.getpixel((10, 10)) == (255, 0, 0)
    assert np.array_equal(t2i.grid(iter(images), cell=128), sheet)
    assert t2i.grid(images, columns=3, labels=["a", "", "c"]).size == (3 * 134 + 6, 134 + 16 + 6)
    wide = Image.new("RGB", (40, 20), "red")
    smaller, larger = t2i.grid([wide], cell=80), t2i.grid([wide, wide], cell=16)
    assert smaller.getpixel((40, 44)) == (255, 0, 0) and smaller.getpixel((40, 48)) == (255,) * 3
    assert larger.getpixel((21, 13)) == (255, 0, 0) and larger.getpixel((24, 13)) == (255,) * 3
    for arguments, options, message in (
        ((images[0],), {}, "needs a list of PIL images"),
        (([np.zeros((8, 8, 3))],), {}, "needs a list of PIL images"),
        (([],), {}, "at least one image"),
        ((images, 0), {}, "columns=0"),
        ((images, "2"), {}, "columns='2' must be a whole number"),
        ((images,), {"cell": -1}, "cell=-1 must be at least 1"),
        ((images,), {"labels": ["a"]}, "1 labels for 3 images"),
        ((images,), {"labels": 3}, "labels is 3: give a list"),
        ((3,), {}, "needs a list of PIL images, but got 3"),
    ):
        with pytest.raises(t2i.UserError, match=message):
            t2i.grid(*arguments, **options)


def test_geneval_score_takes_several_forms_of_input(tmp_path):
    from t2i.shapes.shapes_prompts import colors

    entry = colors("circle", "red")
    image = Image.new("RGB", (64, 64), "white")
    path = tmp_path / "image.png"
    image.save(path)
    detector = ShapesDetector()
    plain = geneval.score([image], [entry], detector)
    for images in ([image], image, [np.asarray(image)], np.asarray(image)[None], [path], str(path)):
        for metadata in ([entry], entry, entry["prompt"], [entry["prompt"]]):
            assert geneval.score(images, metadata, detector) == plain
    grey = geneval.score(np.asarray(image)[..., 0], [entry], detector)
    assert grey == plain, "a 2-D array is one image, not one image per row"
    official = official_prompts()[0]
    assert geneval._known_prompts()[official["prompt"]] == official
    for images, metadata, message in (
        ([image], ["a poem"], "score cannot know what 'a poem' asks for.*include"),
        ([image], [{"prompt": "a"}], r"metadata\[0\] is .*not GenEval metadata: .*tag, a prompt"),
        ([image], [{**entry, "include": ["circle"]}], "a list of objects such as"),
        ([image], [7], r"metadata\[0\] is 7"),
        ([tmp_path / "none.png"], [entry], r"images\[0\] cannot be read"),
        (
            [np.zeros((8, 8, 3))],
            [entry],
            r"images\[0\] is an array of float64, .*: score takes PIL",
        ),
        ([None], [entry], r"images\[0\] is None: score takes"),
        ([np.zeros(8, np.uint8)], [entry], r"images\[0\] is an array of uint8, \[8\]"),
        (np.zeros((4, 8, 8), np.uint8), [entry], r"images\[0\] cannot be read"),
        ([Image.new("I;16", (8, 8))], [entry], r"images\[0\] cannot be read.*8-bit RGB"),
        ([image] * 3, [entry] * 2, "3 images for 2 prompts"),
        (None, [entry], "images is None: give a list"),
        ([image], None, "metadata is None: give a list"),
    ):
        with pytest.raises(t2i.UserError, match=message):
            geneval.score(images, metadata, detector)
    for other in ("shapes", ShapesDetector):
        with pytest.raises(t2i.UserError, match=r"detector is .*geneval.detectors.load_detector"):
            geneval.score([image], [entry], other)
    with pytest.raises(t2i.UserError, match=r"options is .*give geneval.RuleOptions"):
        geneval.score([image], [entry], detector, options={"threshold": 0.3})


def test_dpg_score_refuses_bad_arguments():
    judge, image = load_answerer("shapes"), Image.new("RGB", (64, 64))
    with pytest.raises(t2i.UserError, match="answer_prompt needs a list of PIL images"):
        answer_prompt(judge, image, [])
    with pytest.raises(t2i.UserError, match="score needs a QuestionGraph first"):
        dpg_score([image], ["a dog"])
    with pytest.raises(t2i.UserError, match="score needs a mapping from items to answers"):
        dpg_score(QuestionGraph((), ""), [image])
    graph = load_questions("shapes")
    (item, questions), *_ = graph.items.items()
    seen = answer_prompt(judge, iter([image]), questions)
    assert seen == answer_prompt(judge, [image], questions) and len(seen) == 1
    with pytest.raises(t2i.UserError, match="answer_prompt needs a list of PIL images"):
        answer_prompt(judge, iter([]), questions)
    with pytest.raises(t2i.UserError, match="mode I;16 cannot be judged"):
        answer_prompt(judge, [Image.new("I;16", (64, 64))], questions)
    for answers, message in (
        ([dict.fromkeys(seen[0], True)], f"answer to line .*{item}.* is True: answers are texts"),
        (seen[0], r"give a list with the answers of one image after another"),
        (["yes"], r"give a list with the answers of one image after another"),
    ):
        with pytest.raises(t2i.UserError, match=message):
            dpg_score(graph, {item: answers})


def test_evaluate_takes_paths_as_texts_and_says_what_it_needs(model, tmp_path):
    benchmark = GenEval(load_prompts("shapes"), ShapesDetector(), prompts="shapes")
    entry, few = benchmark.entries[0], Scope(samples=1, limit=1)
    write_prompt(tmp_path / "images", 0, entry)
    save_png(Image.new("RGB", (64, 64)), tmp_path / "images" / sample_file(0, 0))
    found = evaluate(benchmark, f"{tmp_path}/out", images=f"{tmp_path}/images", scope=few)
    assert found["coverage"]["judged"] == 1
    out = tmp_path / "other"
    for options, message in (
        ({}, "either model=... or images=FOLDER"),
        ({"model": model, "images": out}, "either model=... or images=FOLDER"),
        ({"model": "shapes"}, "model is 'shapes': evaluate takes a TensorAR"),
        ({"model": model, "scope": {"samples": 1}}, "scope is .*: evaluate takes a Scope"),
        ({"model": model, "draw": {"seed": 1}}, "draw is .*: evaluate takes a DrawOptions"),
        ({"images": 3}, "images is 3: give a path"),
    ):
        with pytest.raises(t2i.UserError, match=message):
            evaluate(benchmark, out, **options)
    with pytest.raises(t2i.UserError, match="detector is 'shapes': give a loaded detector"):
        GenEval(benchmark.entries, "shapes")
    with pytest.raises(t2i.UserError, match="prompt 0 has the tag 'overall', which is the name of"):
        GenEval([entry | {"tag": "overall"}], ShapesDetector())
    with pytest.raises(t2i.UserError, match="samples is array"):
        check_inputs(np.zeros((4, 8, 8, 3), np.uint8), out, allow_fewer=True)
