"""Parts of `gpu_check.py` that check numbers: do they equal the official code's, and do different
ways of computing them agree?
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import helpers
import test_golden_llamagen
import test_golden_open_magvit2
import test_golden_rar
import torch
from helpers import GoldenCase
from torch import Tensor

from launch.lab.gpu_speed import Rows
from launch.measure.shapes import open_backbone
from launch.measure.timed_sampling import DTYPES
from t2i.loading import load_backbone
from t2i.models.base import Backbone, LoadOptions
from t2i.models.janus.janus_model import Janus
from t2i.models.llamagen.llamagen_model import LlamaGen
from t2i.models.open_magvit2.open_magvit2_model import OpenMAGVIT2
from t2i.models.rar.rar_model import RAR
from t2i.models.tokenizers.lfq import LFQTokenizer
from t2i.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig, Speed
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows

LOGITS, PIXELS = 1e-4, 5e-4  # the golden tests' tolerances, fp32
BF16 = 0.08  # largest allowed difference of logits in bf16, as a share of the largest logit
GAP = 2e-3  # largest gap between two logits whose order rounding may change, fp32
GREEDY = SamplingConfig(temperature=0.0)


# -- official outputs ------------------------------------------------------------------------------


@dataclass
class Golden:
    """A tiny official checkpoint and what the official code computed with it."""

    backbone: Backbone
    prepared: dict[str, Tensor]
    codes: Tensor
    """The codes [B, T, S] that `logits` were computed from."""
    logits: dict[bool, tuple[Tensor, ...]]
    """Teacher-forced logits of each sub-token [B, T, V_s], by whether the condition was dropped."""
    greedy: list[tuple[SamplingConfig, Tensor]]
    """Sampling settings and the codes [B, T, S] drawn with them."""


def _stored(case: GoldenCase, name: str) -> bool:
    return f"expected.{name}" in case.tensors


def _forced(
    case: GoldenCase, *, null: str = "null", parts: tuple[str, ...] = ("",)
) -> dict[bool, tuple[Tensor, ...]]:
    """`Golden.logits` as the case stores them."""
    return {
        drop: tuple(case.expected(f"tf_logits_{part}{null if drop else 'cond'}") for part in parts)
        for drop in (False, True)
    }


def llamagen_case(case: GoldenCase) -> Golden:
    config, text = case.config, case.config["model_type"] == "t2i"
    if text:
        mask = case.input("caption_mask").bool()
        prepared = {"features": case.input("caption_features"), "mask": mask}
    else:
        prepared = {"labels": case.input("class_ids")}
    guided = replace(GREEDY, cfg_scale=config["cfg_scale"])
    runs = {"cfg": guided, "cfg1": GREEDY}
    if _stored(case, "greedy_ids_cfg_interval"):
        runs["cfg_interval"] = replace(guided, cfg_interval=config["cfg_interval"])
    return Golden(
        LlamaGen.load(
            case.folder / config["checkpoint_file"],
            LoadOptions(test_golden_llamagen.config_of(config)),
        ),
        prepared,
        case.input("image_codes")[..., None],
        _forced(case),
        [(run, case.expected(f"greedy_ids_{name}")[..., None]) for name, run in runs.items()],
    )


def rar_case(case: GoldenCase) -> Golden:
    config = case.config
    return Golden(
        RAR.load(case.folder / config["checkpoint_file"], LoadOptions(grid=tuple(config["grid"]))),
        {"labels": case.input("class_ids")},
        case.input("image_codes")[..., None],
        _forced(case),
        [
            (
                test_golden_rar.sampling_of(*settings, temperature=0.0),
                case.expected(f"greedy_ids_{name}")[..., None],
            )
            for name, settings in config["guidance"].items()
            if _stored(case, f"greedy_ids_{name}")
        ],
    )


def open_magvit2_case(case: GoldenCase) -> Golden:
    config, codes_of = case.config, test_golden_open_magvit2.codes_of
    return Golden(
        OpenMAGVIT2.load(
            case.folder / config["checkpoint_file"],
            LoadOptions(test_golden_open_magvit2.config_of(config)),
        ),
        {"labels": case.input("class_ids")},
        codes_of(case.input, "codes_{}"),
        _forced(case, parts=tuple(f"{p}_" for p in test_golden_open_magvit2.SUB_TOKENS)),
        [
            (replace(GREEDY, cfg_scale=scale), codes_of(case.expected, f"greedy_{{}}_{name}"))
            for name, scale in (("cfg", tuple(config["cfg_scale"])), ("nocfg", 1.0))
        ],
    )


def janus_case(case: GoldenCase) -> Golden:
    backbone = Janus.load(case.folder / case.config["original_dir"])
    examples = json.loads((case.folder / "prompts.json").read_text(encoding="utf-8"))["examples"]
    return Golden(
        backbone,
        backbone.prepare([example["text"] for example in examples[:2]]),
        case.input("image_codes")[..., None],
        _forced(case, null="uncond"),
        [
            (replace(GREEDY, cfg_scale=scale), case.expected(f"greedy_ids_{name}")[..., None])
            for name, scale in (("cfg", case.config["cfg_weight"]), ("cfg1", 1.0))
        ],
    )


FAMILIES = {
    "LlamaGen GPT": llamagen_case,
    "Janus-Pro": janus_case,
    "Open-MAGVIT2 AR": open_magvit2_case,
    "RAR generator": rar_case,
}


def golden(device: torch.device, tiny: bool) -> Rows:
    """Compare each golden checkpoint in fp32 and bf16. In bf16, greedy codes need not be equal: one
    code that rounding changes also changes those after it.
    """
    for family, read in FAMILIES.items():
        for parameter in helpers.golden_cases(family):
            case = parameter.values[0]
            for dtype in DTYPES:
                about = {"case": case.folder.name, "dtype": dtype}
                yield about, partial(compare, read, case, device, dtype)


def compare(read, case: GoldenCase, device: torch.device, dtype: str) -> dict:
    stored: Golden = read(case)
    model = TensorAR(stored.backbone, presets.base()).to(device, DTYPES[dtype]).eval()
    prepared = {k: v.to(device) for k, v in stored.prepared.items()}
    codes = stored.codes.to(device)
    with torch.device(device):
        forced = {d: helpers.teacher_forced(model, prepared, codes, d) for d in stored.logits}
    stepped = helpers.cached(model, prepared, codes)
    expected = [torch.cat(halves) for halves in zip(*stored.logits.values(), strict=True)]
    largest = max(e.abs().max().item() for e in expected)
    forced_off = difference([torch.cat(h) for h in zip(*forced.values(), strict=True)], expected)
    cached_off = difference(stepped, expected)
    equal = [share(greedy(model, prepared, run), codes) for run, codes in stored.greedy]
    ok = max(forced_off, cached_off) <= (LOGITS if dtype == "fp32" else BF16 * largest)
    return {
        "teacher_forced": forced_off,
        "cached": cached_off,
        "largest_logit": largest,
        "greedy_equal": min(equal),
        "ok": ok and (min(equal) == 1 or dtype != "fp32"),
    }


def difference(ours, expected) -> float:
    """The largest absolute difference."""
    return max((a.cpu() - b).abs().max().item() for a, b in zip(ours, expected, strict=True))


def share(ours: Tensor, expected: Tensor) -> float:
    """Share of equal codes."""
    return (ours.cpu() == expected.cpu()).float().mean().item()


def greedy(model: TensorAR, prepared: dict[str, Tensor], run: SamplingConfig) -> Tensor:
    rows = len(next(iter(prepared.values())))
    return drawn(model, prepared, torch.zeros(rows, dtype=torch.long), run)


def drawn(
    model: TensorAR, prepared: dict, keys: Tensor, run: SamplingConfig, speed: Speed = "eager"
) -> Tensor:
    return model.windows.final_codes(sample_windows(model, prepared, keys, run, speed=speed))


# -- image tokenizers ------------------------------------------------------------------------------


def tokenizers(device: torch.device, tiny: bool) -> Rows:
    """Compare each golden image tokenizer, in fp32, which tokenizers always use."""
    for family, read in TOKENIZERS.items():
        for parameter in helpers.golden_cases(family):
            case = parameter.values[0]
            yield {"case": case.folder.name}, partial(compare_tokenizer, read, case, device)


def compare_tokenizer(read, case: GoldenCase, device: torch.device) -> dict:
    codes, expected_codes, pixels, expected_pixels = read(case, device)
    equal = share(codes.flatten(), expected_codes.flatten())
    off = difference([pixels], [expected_pixels])
    return {"codes_equal": equal, "pixels": off, "ok": equal == 1 and off <= PIXELS}


def vq_case(case: GoldenCase, device: torch.device) -> tuple[Tensor, ...]:
    tokenizer = VQTokenizer.load(case.folder / case.config["checkpoint_file"]).to(device)
    codes = tokenizer.encode(case.input("image").to(device))
    stored = case.expected("image_codes"), case.expected("image_decoded")
    return codes, stored[0], tokenizer.decode(stored[0].view(codes.shape).to(device)), stored[1]


def lfq_case(case: GoldenCase, device: torch.device) -> tuple[Tensor, ...]:
    tokenizer = LFQTokenizer.load(case.folder / case.config["checkpoint_file"], ema=True).to(device)
    codes = tokenizer.encode(case.input("image").to(device))
    pre, post = test_golden_open_magvit2.codes_of(case.expected, "ema_codes_{}").unbind(-1)
    stored = pre + (post << case.config["factorized_bits"][0])
    pixels = tokenizer.decode(stored.view(codes.shape).to(device))
    return codes, stored, pixels, case.expected("ema_decoded")


def maskgit_case(case: GoldenCase, device: torch.device) -> tuple[Tensor, ...]:
    path = case.folder / case.config["tokenizer"]["checkpoint_file"]
    tokenizer = MaskGITVQGAN.load(path).to(device)
    codes = tokenizer.encode(2 * case.input("image").to(device) - 1)
    stored = case.expected("image_codes_encoded")
    pixels = tokenizer.decode(stored.view(codes.shape).to(device))
    return codes, stored, (pixels + 1) / 2, case.expected("image_decoded_unclamped")


TOKENIZERS = {
    "VQ tokenizer": vq_case,
    "Open-MAGVIT2 LFQ": lfq_case,
    "RAR generator": maskgit_case,
}


# -- the same numbers in several ways --------------------------------------------------------------

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "llamagen class": lambda: helpers.tiny_llamagen("class"),
    "llamagen text": lambda: helpers.tiny_llamagen("text"),
    "janus": helpers.tiny_janus,
    "open_magvit2": helpers.tiny_open_magvit2,
    "rar": helpers.tiny_rar,
}
SHIPPED: dict[str, Callable[[], Backbone]] = {
    "shapes base": lambda: load_backbone("llamagen", "shapes"),
    "janus shapes base": lambda: load_backbone("janus", "shapes-janus"),
}


def identities(device: torch.device, tiny: bool) -> Rows:
    """Check a tiny random model of each kind, and the shipped bases, in fp32 and bf16."""
    for name, build in (BACKBONES if tiny else BACKBONES | SHIPPED).items():
        for dtype in DTYPES:
            about = {"backbone": name, "dtype": dtype}
            yield about, partial(several_ways, build, device, dtype)


@torch.no_grad()
def several_ways(
    build: Callable[[], Backbone], device: torch.device, dtype: str, batch: int = 6
) -> dict:
    backbone = build().to(device, DTYPES[dtype])
    base, refined = (TensorAR(backbone, m()).eval() for m in (presets.base, presets.iclr2026))
    prepared = {
        k: v.to(device, DTYPES[dtype] if v.is_floating_point() else None)
        for k, v in helpers.tiny_prepared(backbone, batch).items()
    }
    codes = helpers.tiny_codes(backbone, batch, backbone.spec.num_tokens).to(device)
    with torch.device(device):
        halves = [helpers.teacher_forced(base, prepared, codes, drop) for drop in (False, True)]
    forced = [torch.cat(h).cpu() for h in zip(*halves, strict=True)]
    off, largest = difference(helpers.cached(base, prepared, codes), forced), forced[0].abs().max()
    guided, settings = replace(GREEDY, cfg_scale=2.0), SamplingConfig(cfg_scale=2.0)
    same = share(greedy(refined, prepared, guided), greedy(base, prepared, guided))
    keys = make_keys(0, torch.arange(batch))
    together = drawn(base, prepared, keys, settings)
    recorded = {}
    if device.type == "cuda":
        eager, graphs = (drawn(refined, prepared, keys, settings, s) for s in ("eager", "graphs"))
        recorded = {"graphs_equal": share(graphs, eager)}
    rows = [slice(i, i + 1) for i in range(batch)]
    alone = [drawn(base, {k: v[r] for k, v in prepared.items()}, keys[r], settings) for r in rows]
    ok = off <= (LOGITS if dtype == "fp32" else BF16 * largest.item()) and same == 1
    return {
        "cached": off,
        "largest_logit": largest.item(),
        "slot_0_equal": same,
        "alone_equal": share(torch.cat(alone), together),
        **recorded,
        "ok": ok and recorded.get("graphs_equal", 1) == 1,
    }


def same_codes(device: torch.device, tiny: bool) -> Rows:
    """Check shipped bases and a published shape with every way of running steps on this device."""
    builds = SHIPPED | {"LlamaGen-B": lambda: open_backbone("llamagen-B", DTYPES["fp32"], device)}
    if tiny:
        builds = {"llamagen class": BACKBONES["llamagen class"]}
    speeds: tuple[Speed, ...] = ("graphs", "compiled") if device.type == "cuda" else ("eager",)
    for speed in speeds:
        for name, build in builds.items():
            yield {"backbone": name, "speed": speed}, partial(by_speed, build, device, speed)


@torch.no_grad()
def by_speed(
    build: Callable[[], Backbone], device: torch.device, speed: Speed, batch: int = 4
) -> dict:
    """Compare greedy codes at this speed with eager ones. Each batch is drawn twice, so that what
    was recorded or compiled is used again.
    """
    torch.compiler.reset()
    backbone = build().to(device, DTYPES["fp32"])
    base, refined = (TensorAR(backbone, m()).eval() for m in (presets.base, presets.iclr2026))
    prepared = {k: v.to(device) for k, v in helpers.tiny_prepared(backbone, batch).items()}
    keys = torch.zeros(batch, dtype=torch.long)
    found: dict = {}
    for k, model in ((1, base), (4, refined)):
        eager = drawn(model, prepared, keys, GREEDY)
        for _ in range(2):
            codes = drawn(model, prepared, keys, GREEDY, speed)
        gap = preference(base, prepared, eager, codes, device)
        found |= {f"k{k}_equal": share(codes, eager), f"k{k}_gap": gap}
    return {**found, "ok": max(found["k1_gap"], found["k4_gap"]) <= GAP}


def preference(
    base: TensorAR, prepared: dict, codes: Tensor, others: Tensor, device: torch.device
) -> float:
    """Where `others` first differ from codes [B, T, 1], by how much the base prefers `codes`: the
    largest gap of logits over images. (An untrained TensorAR predicts the same as its base.)
    """
    with torch.device(device):
        (logits,) = helpers.teacher_forced(base, prepared, codes)
    differ = (codes != others)[..., 0]
    first = differ & (differ.cumsum(1) == 1)
    picked = [logits.gather(-1, c)[..., 0] for c in (codes, others)]
    return (picked[0] - picked[1])[first].abs().max().item() if first.any() else 0.0
