"""A table of every use of private or undocumented parts of other libraries. If such a part changes,
the test of its row fails.

Everything else that is used is documented by its library. Case 20: the kit once imitated a class of
transformers, which changed in a minor release. Deprecation warnings are errors in these tests
(`filterwarnings` in pyproject.toml).
"""

import ast
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch import nn

from t2i import products

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("t2i", "geneval", "dpg_bench", "launch")


# -- the checks -----------------------------------------------------------------------------------
def shared_memory_extension(_) -> None:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    from t2i.training.engine import start_processes

    start_processes()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert build_shm_op() is None


def engine(tmp_path: Path) -> None:
    import deepspeed

    from t2i.training.engine import start_processes

    start_processes()
    assert isinstance(deepspeed.utils.logger, logging.Logger)
    layer = nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "part": "a"}, {"params": [layer.bias], "part": "b"}]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    options = {"zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    started, *_ = deepspeed.initialize(
        model=layer,
        optimizer=torch.optim.AdamW(groups, lr=0.0),
        config=config | options,
        dist_init_required=False,
    )
    assert started.module is layer
    before = {name: value.clone() for name, value in layer.named_parameters()}
    for group in started.optimizer.param_groups:
        group["lr"] = {"a": 0.1, "b": 0.0}[group["part"]]
    started.backward(started(torch.ones(1, 2)).sum())
    started.step()
    assert started.get_global_grad_norm() > 0
    moved = {k for k, value in layer.named_parameters() if not torch.equal(value, before[k])}
    assert moved == {"weight"}


def shares(_) -> None:
    """Only the names. Resuming under every ZeRO stage and with other numbers of processes is tested
    in test_run_safety.py, test_training.py and test_ranks.py.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils.tensor_fragment import tensor_fragment

    assert "param_group_index" in tensor_fragment.__dataclass_fields__
    assert (
        "flat_hp_partition"
        in inspect.signature(tensor_fragment.set_optim_state_fragment).parameters
    )
    assert "lp_param._hp_mapping = " in inspect.getsource(
        import_module("deepspeed.utils.mixed_precision_linkage")
    )
    for call in ("safe_set_local_fp32_param", "safe_set_local_optimizer_state"):
        assert hasattr(import_module("deepspeed.utils"), call)
    assert "self.fp32_partitioned_groups_flat" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3)


def zero_options(_) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert "offload_optimizer" in DeepSpeedZeroConfig.model_fields
    assert DeepSpeedZeroConfig(stage=2).stage == 2


def adapters(_) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    inject_adapter_in_model(LoraConfig(r=1, target_modules=".*0"), model)
    assert [name for name, _ in model.named_parameters()] == [
        "0.base_layer.weight",
        "0.lora_A.default.weight",
        "0.lora_B.default.weight",
    ]
    assert isinstance(model[0], BaseTunerLayer)
    nn.init.ones_(model[0].lora_B["default"].weight)
    x, adapted = torch.ones(1, 2), model(torch.ones(1, 2))
    model[0].enable_adapters(False)
    assert torch.equal(model(x), model[0].get_base_layer()(x))
    model[0].enable_adapters(True)
    model[0].merge()
    torch.testing.assert_close(model[0].get_base_layer()(x), adapted)


def blip_parts(_) -> None:
    from transformers import BlipConfig, BlipForQuestionAnswering

    small = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = BlipForQuestionAnswering(BlipConfig(text_config=small, vision_config=small))
    assert "pixel_values" in inspect.signature(model.vision_model.forward).parameters
    for part in (model.text_encoder, model.text_decoder):
        assert "encoder_hidden_states" in inspect.signature(part.forward).parameters
    assert isinstance(model.decoder_start_token_id, int)


def loading_report(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import T5EncoderModel

    from t2i.shapes.tiny_t5 import build_tiny_t5

    folder = build_tiny_t5(tmp_path, ["a b"], d_model=8, num_layers=1, num_heads=2, d_ff=8)
    weights = load_file(folder / "model.safetensors")
    lost, bent = "encoder.final_layer_norm.weight", "encoder.block.0.layer.0.layer_norm.weight"
    weights[bent] = torch.ones(3)
    weights["another"] = weights.pop(lost)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = T5EncoderModel.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert list(report["missing_keys"]) == [lost]
    assert list(report["unexpected_keys"]) == ["another"]
    assert [key for key, *_ in report["mismatched_keys"]] == [bent]


def clip_parts(_) -> None:
    import open_clip

    from geneval.colors import ARCHITECTURE, require_quick_gelu

    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    require_quick_gelu(clip)


def inception_parts(_) -> None:
    from torchvision.models import Inception3

    with torch.device("meta"):
        network = Inception3(aux_logits=False, init_weights=False)
    children = dict(network.named_children())
    names = list(children)
    assert names[0] == "Conv2d_1a_3x3" and names.index("avgpool") == names.index("Mixed_7c") + 1
    pooling = {name for name, layer in children.items() if hasattr(layer, "branch_pool")}
    assert pooling == {f"Mixed_{n}" for n in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c")}


def torchscript(_) -> None:
    assert callable(torch.jit.load)


def silu_gradient(_) -> None:
    x = torch.linspace(-4, 4, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.nn.functional.silu(x).sum(), x)
    assert torch.equal(torch.ops.aten.silu_backward(torch.ones(9), x.detach()), gradient)


def freezing(_) -> None:
    """Only that the settings exist; test_speed.py compiles steps with them."""
    from torch._dynamo import mark_dynamic
    from torch._inductor import config

    before = config.freezing
    with config.patch({"freezing": True, "cpp.enable_concat_linear": True}):
        assert config.freezing and config.cpp.enable_concat_linear
    assert config.freezing == before
    mark_dynamic(torch.empty(3, 0), 0)


def generated_products(_) -> None:
    """Only that the names exist; test_speed.py compiles steps with them."""
    if not hasattr(chooser := products.select_algorithm(), "add_preprocessing_fn"):
        pytest.skip("this torch has no such function, and MKL's products are used")
    assert isinstance(chooser.get_algorithm_selector_cache().preprocessing_fns, list)
    with chooser.config.patch({"max_autotune_gemm": True, "max_autotune_gemm_backends": "CPP"}):
        assert chooser.config.max_autotune_gemm


def guard_filter(_) -> None:
    found = []
    options = {"guard_filter_fn": lambda guards: found.extend(guards) or [False for _ in guards]}
    plus_one = torch.compile(lambda x: x + 1, backend="eager", options=options)
    plus_one(torch.ones(3))
    assert {("TENSOR_MATCH", "x")} < {(guard.guard_type, guard.name) for guard in found}


def fp32_precision(_) -> None:
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch has no switch for this before 2.9")
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    assert matmul.fp32_precision == "bf16"
    matmul.fp32_precision = before


def builder_hash(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "a.parquet")
    options = {"data_files": str(tmp_path / "a.parquet"), "cache_dir": str(tmp_path)}
    builder = datasets.load_dataset_builder("parquet", **options)
    assert builder.hash and isinstance(builder.hash, str)


def offline(_) -> None:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="OfflineModeIsEnabled"):  # no request is sent
            datasets.load_dataset_builder("nobody/no-such-data")


def pillow_readers(_) -> None:
    from PIL import Image

    Image.init()
    assert {"PNG", "JPEG", "WEBP"} <= set(Image.OPEN)


@dataclass(frozen=True)
class Touch:
    library: str
    what: str
    where: str
    """The file that relies on it, and a piece of its code."""
    why: str
    check: Callable[[Path], None]


TOUCHES = (
    Touch(
        "deepspeed",
        "ops.__compatible_ops__ decides whether the CPU's shared-memory extension is compiled",
        "t2i/training/engine.py: __compatible_ops__",
        "no setting turns the extension off, and without a compiler training would fail",
        shared_memory_extension,
    ),
    Touch(
        "deepspeed",
        "the engine's optimizer keeps the groups' own keys and obeys their lr; get_global_grad_norm; names of save and load options",
        "t2i/training/engine.py: engine.optimizer.param_groups",
        "its schedulers cannot give each part of the model its own function of the step",
        engine,
    ),
    Touch(
        "deepspeed",
        "where ZeRO keeps the optimizer's moments of a parameter",
        "t2i/training/state.py: _hp_mapping",
        "the documented functions work only after the first step, and for one group",
        shares,
    ),
    Touch(
        "deepspeed",
        "DeepSpeedZeroConfig has the options of zero_optimization as pydantic fields",
        "t2i/training/engine.py: DeepSpeedZeroConfig",
        "DeepSpeed itself ignores misspelled options, or fails late",
        zero_options,
    ),
    Touch(
        "peft",
        "BaseTunerLayer, and the names lora_A.default, lora_B.default and base_layer inside it",
        "t2i/lora.py: BaseTunerLayer",
        "PeftModel would wrap the backbone, so adapters are injected, read, merged and disabled here",
        adapters,
    ),
    Touch(
        "transformers",
        "the parts of BlipForQuestionAnswering and their arguments",
        "dpg_bench/vqa_answerers.py: self.model.text_decoder",
        "generate() encodes the image again for each question and gives no log-probabilities of two words",
        blip_parts,
    ),
    Touch(
        "transformers",
        "keys of the report of from_pretrained(output_loading_info=True)",
        "t2i/weights.py: mismatched_keys",
        "weights that do not fit are refused by name (also geneval/mmdet_weights.py, dpg_bench/vqa_answerers.py)",
        loading_report,
    ),
    Touch(
        "open_clip",
        "CLIP accepts the result of get_model_config; its activations are attributes `gelu` of class QuickGELU",
        "geneval/colors.py: QuickGELU",
        "create_model would look for its own files; with another activation, OpenAI's weights give other colors",
        clip_parts,
    ),
    Touch(
        "torchvision",
        "Inception3's children in the order in which they run; `branch_pool`, the last branch",
        "t2i/evaluation/fid/inception.py: branch_pool",
        "FID's network pools differently; test_golden_adm.py shows that the rest is equal",
        inception_parts,
    ),
    Touch(
        "torch",
        "torch.jit.load, which is deprecated",
        "geneval/colors.py: torch.jit.load",
        "OpenAI publishes CLIP as a TorchScript archive",
        torchscript,
    ),
    Touch(
        "torch",
        "the operator aten.silu_backward",
        "t2i/models/lean.py: torch.ops.aten.silu_backward",
        "no documented function gives silu's gradient with the same bits",
        silu_gradient,
    ),
    Touch(
        "torch",
        "inductor's settings `freezing` and `cpp.enable_concat_linear`; mark_dynamic for a varying length",
        "t2i/tensorar/speed.py: config.patch({",
        "on a CPU, products of a few rows are twice as fast with weights stored in reading order",
        freezing,
    ),
    Touch(
        "torch",
        "torch.compile's option `guard_filter_fn`, and the types and names of guards",
        "t2i/tensorar/speed.py: guard_filter_fn",
        "checking the guards of a whole model takes a tenth of a small model's step",
        guard_filter,
    ),
    Touch(
        "torch",
        "torch.backends.mkldnn.matmul.fp32_precision, which is only partly documented",
        "t2i/products.py: fp32_precision",
        "it makes torch use oneDNN for fp32 products, which is twice as fast on AMD processors",
        fp32_precision,
    ),
    Touch(
        "torch",
        "inductor's choice of a product's code: `add_preprocessing_fn`, names of choices, two settings",
        "t2i/products.py: torch._inductor",
        "on AMD processors without AVX-512, generated code is twice as fast for products of a few rows",
        generated_products,
    ),
    Touch(
        "datasets",
        "DatasetBuilder.hash",
        "t2i/data/sources/tables.py: builder.hash",
        "it changes with the commit of a hub data set, so codes of older images are not reused",
        builder_hash,
    ),
    Touch(
        "datasets",
        "config.HF_HUB_OFFLINE, set while the program runs",
        "t2i/data/sources/tables.py: datasets.config.HF_HUB_OFFLINE",
        "without a connection the library retries for half a minute at every file",
        offline,
    ),
    Touch(
        "pillow",
        "Image.OPEN, the formats that this build can read",
        "t2i/data/images.py: Image.OPEN",
        "only some builds can read AVIF",
        pillow_readers,
    ),
)

DOCUMENTED = {
    "deepspeed.utils",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "matplotlib.figure",
    "pyarrow.compute",
    "pyarrow.parquet",
    "safetensors.torch",
    "tokenizers.processors",
    "torch.distributed",
    "torch.nn",
    "torch.nn.attention",
    "torch.nn.functional",
    "torch.overrides",
    "torch.profiler",
    "torch.utils.checkpoint",
    "torch.utils.data",
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
    "torchvision.models",
    "torchvision.transforms.functional",
    "transformers.utils",
    "tyro.conf",
}
"""Submodules of libraries that are documented under these names. Undocumented ones have a row above
instead.
"""


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda t: f"{t.library}: {t.what}")
def test_undocumented_parts_still_exist(touch, tmp_path):
    file, _, words = touch.where.partition(": ")
    assert words in (ROOT / file).read_text(), f"{file} does not touch {words} any more"
    touch.check(tmp_path)


def deep_imports() -> Iterator[tuple[str, str]]:
    """(file, module) of every import of a library's submodule or private name."""
    for folder in PROGRAMS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    private = [f"{node.module}.{a.name}" for a in node.names if a.name[0] == "_"]
                    modules = [node.module, *private]
                else:
                    continue
                for module in modules:
                    if "." in module and module.split(".")[0] in LIBRARIES:
                        yield str(path.relative_to(ROOT)), module


def required(name: str) -> dict[str, str]:
    """Package -> lowest version, from a requirements file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"(\w[\w-]*)(?:[>=]=([\d.]+))?", line) for line in lines)
    return {m[1].lower().replace("_", "-"): m[2] for m in found if m}


_IMPORTED_AS = {"open-clip-torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml"}
LIBRARIES = {
    _IMPORTED_AS.get(name, name.replace("-", "_"))
    for file in ("requirements.txt", "requirements-dev.txt")
    for name in required(file)
}


def test_no_other_submodules_are_imported():
    listed = {
        "deepspeed.runtime.zero.config",
        "peft.tuners.tuners_utils",
        "torch._dynamo",
        "torch._inductor",
    }
    unknown = {
        (file, module) for file, module in deep_imports() if module not in DOCUMENTED | listed
    }
    assert not unknown, f"documented by its library, or a row of the table? {unknown}"
    assert not any(module.startswith("transformers.models") for _, module in deep_imports())


# -- the lists of what is installed ---------------------------------------------------------------
def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_the_lock_fits_the_requirements(name):
    lock = required("requirements.lock")
    for package, lowest in required(name).items():
        assert package in lock, f"{package} is not in requirements.lock; run .ci/lock"
        assert as_numbers(lock[package]) >= as_numbers(lowest), f"{package}; run .ci/lock"


def test_the_lock_installs_on_any_machine():
    """It contains only versions: no paths or URLs, no packages for one kind of machine."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert lines[0].startswith("#")
    for line in lines[1:]:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
        assert not line.startswith(("nvidia-", "cuda-", "triton")), line


def test_the_lock_installs_on_any_python_that_the_kit_accepts():
    """One locked package needed Python 3.11.5, so the README's commands failed on Debian 12."""
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    for package, version in required("requirements.lock").items():
        with suppress(PackageNotFoundError):
            if (found := distribution(package)).version == version:
                accepted = SpecifierSet(found.metadata["Requires-Python"] or "")
                assert f"{oldest}.0" in accepted, f"lock an older {package}, in .ci/lock too"


def test_users_do_not_install_development_tools():
    assert not required("requirements.txt").keys() & {"pytest", "pytest-xdist", "ruff"}
