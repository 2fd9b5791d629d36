"""Helpers of several test files: golden cases, and tiny models with random weights."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from t2i.data.captioned import CaptionedImages
from t2i.data.samples import Source
from t2i.data.sources import open_source as opening
from t2i.models.base import Backbone, LoadOptions
from t2i.models.janus.janus_model import Janus
from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
from t2i.models.open_magvit2.open_magvit2_model import OpenMAGVIT2, OpenMAGVIT2Config
from t2i.models.rar.rar_model import RAR, RARConfig
from t2i.models.tokenizers.lfq import LFQConfig, LFQTokenizer
from t2i.models.tokenizers.maskgit_vqgan import MaskGITConfig, MaskGITVQGAN
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.sampling import SamplingConfig, SubTokenSampling
from t2i.shapes.tiny_janus import build_tiny_janus
from t2i.tensorar import presets
from t2i.tensorar.drawing import candidates, rules
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import (
    DecodeState,
    advance,
    drawn_windows,
    encode_rows,
    guidance_table,
    new_state,
    run_prefix,
    window_logits,
)

rare = partial(pytest.param, marks=pytest.mark.slow)
"""Marks a parameter whose test runs only with the slow tests."""
M = TypeVar("M", bound=nn.Module)
GOLDEN_ROOT = Path(os.environ.get("T2I_GOLDEN") or Path(__file__).parent / "golden")


@dataclass(frozen=True)
class GoldenCase:
    """A folder with config.json, checkpoint files and io.safetensors (`input.*`, `expected.*`)."""

    folder: Path
    config: dict

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    def input(self, name: str) -> Tensor:
        return self.tensors[f"input.{name}"]

    def expected(self, name: str) -> Tensor:
        """An expected tensor; skips the test if the case does not have it."""
        if f"expected.{name}" not in self.tensors:
            pytest.skip(f"{self.folder.name} has no expected.{name}")
        return self.tensors[f"expected.{name}"]


def golden_cases(family: str) -> list:
    """Every case under the golden root whose family contains this text, as pytest parameters."""
    cases = []
    for path in sorted(GOLDEN_ROOT.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if family in config.get("family", ""):
            cases.append(pytest.param(GoldenCase(path.parent, config), id=path.parent.name))
    assert cases or "T2I_GOLDEN" in os.environ, f"no golden case of {family} under {GOLDEN_ROOT}"
    return cases


def golden_fixture(family: str):
    """A fixture that runs a file's tests on every case of the family."""

    @pytest.fixture(scope="module", params=golden_cases(family))
    def case(request):
        return request.param

    return case


def golden_base(case: GoldenCase, backbone_class: type[Backbone], config: object) -> TensorAR:
    """The case's generator, loaded as a base model."""
    backbone = backbone_class.load(
        case.folder / case.config["checkpoint_file"], LoadOptions(config)
    )
    return TensorAR(backbone, presets.base()).eval()


def golden_folder(name: str) -> Path:
    """A folder of golden data; skips the test file if T2I_GOLDEN does not have it."""
    folder = GOLDEN_ROOT / name
    if "T2I_GOLDEN" in os.environ and not folder.is_dir():
        pytest.skip(f"no {name} in {GOLDEN_ROOT}", allow_module_level=True)
    return folder


def golden_table(name: str) -> dict:
    """The JSON table of this name under the golden root; skips the test if there is none."""
    path = next(GOLDEN_ROOT.rglob(name), None)
    if path is None:
        pytest.skip(f"no {name} under {GOLDEN_ROOT}")
    return json.loads(path.read_text(encoding="utf-8"))


def teacher_forced(model: TensorAR, prepared: dict, codes: Tensor, drop: bool = False) -> tuple:
    """A base model's logits [B, T, V_s] for each sub-token of codes [B, T, S]."""
    condition = model.backbone.encode_condition(prepared, torch.full((len(codes),), drop))
    windows = model.windows.gather(codes)
    with torch.no_grad():
        hidden = model.decode_slots(model.hidden(condition, windows))
        return tuple(logits[:, :, 0] for logits in model.slot_logits(hidden, windows))


def prefill(model: TensorAR, prepared: dict, config: SamplingConfig) -> tuple[Tensor, DecodeState]:
    """Hidden states [R, D] that predict window 0, and the state to continue from."""
    scales = guidance_table(model, config)
    condition = encode_rows(model.backbone, prepared, guided=scales is not None)
    state = new_state(model, condition, scales, drawn_windows(model, config))
    return run_prefix(model.backbone, state), state


def feed(model: TensorAR, window: Tensor, index: int, state: DecodeState) -> Tensor:
    """Hidden states [R, D] after window `index`, [B, k, S]."""
    at = torch.tensor([index], device=window.device)
    return advance(model, window[:, None], at, state, state.extent(index))[:, 0]


def cached(model: TensorAR, prepared: dict, codes: Tensor) -> tuple:
    """The logits of `teacher_forced`, computed by prefill and single steps with guidance:
    [2B, T, V_s], conditional rows first.
    """
    h, state = prefill(model, prepared, SamplingConfig(cfg_scale=2.0))
    outputs = [h]
    for t in range(codes.shape[1] - 1):
        outputs.append(feed(model, codes[:, t, None], t, state))
    with torch.no_grad():
        return model.backbone.all_logits(torch.stack(outputs, 1), torch.cat([codes, codes]))


@torch.no_grad()
def base_loss(model: TensorAR, prepared: dict, codes: Tensor) -> Tensor:
    """A base model's cross entropy [1] on codes [B, T, S]."""
    condition = model.backbone.encode_condition(prepared)
    return model(codes, condition, model.windows.gather(codes)).means()


def filter_logits(logits: Tensor, rule: SubTokenSampling) -> Tensor:
    """Logits [..., V] divided by the temperature, -inf where a filter removes the code."""
    scores, codes = candidates(logits, rule)
    return torch.full_like(logits, -torch.inf).scatter(-1, codes.expand_as(scores), scores)


def drawn_by_torch(model: TensorAR, prepared: dict, config: SamplingConfig, steps: int) -> Tensor:
    """Codes [B, steps, S] drawn with torch's own generator in the official order: one multinomial
    over the batch for each sub-token of each code.
    """
    h, state = prefill(model, prepared, config)
    drawn = []
    for t in range(steps):
        code = torch.empty(len(h) // (1 + state.guided), 1, 0, dtype=torch.long)
        for own, _ in rules(config, len(model.backbone.spec.subvocabs)):
            index = torch.tensor([t])
            logits = window_logits(model, model.decode_slots(h), code, index, state)[:, 0]
            pick = torch.multinomial(filter_logits(logits, own).softmax(-1), 1)
            code = torch.cat([code, pick[:, None]], dim=-1)
        drawn.append(code)
        if t + 1 < steps:
            h = feed(model, code, t, state)
    return torch.cat(drawn, dim=1)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def check_uint8_rule(backbone: Backbone) -> None:
    """Assert that decoder values become the official bytes. A few values lie on a rounding edge,
    where a difference of one level is allowed.
    """
    table = golden_table("uint8_rules.json")
    x = torch.tensor(table["x"])
    backbone.frozen.tokenizer = SimpleNamespace(
        decode=lambda codes: x.expand(1, 3, 1, -1), downsample=1
    )
    codes = torch.zeros(1, 1, len(backbone.spec.subvocabs), dtype=torch.long)
    pixels = backbone.decode_images(codes)[0, 0].int()
    off = pixels - torch.tensor(table[backbone.spec.family])[:, None]
    assert off.abs().max() <= 1 and (off == 0).float().mean() > 0.95


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Set random weights under which every part matters: no head is zero, no norm is 1."""
    generator = torch.Generator().manual_seed(seed)
    stored = module.state_dict()
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name not in stored:
                continue  # computed tables, which are not stored
            if value.dim() == 1:
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                head = any(part in name for part in ("output", "head"))
                fan_in = value.shape[-1] if value.dim() == 3 else value[0].numel()  # 3: a table
                value.normal_(std=(3.0 if head else 1.0) * fan_in**-0.5, generator=generator)


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


def on_meta(build: Callable[..., M], *args, **options) -> M:
    """A module on the meta device: shapes without data."""
    with torch.device("meta"):
        return build(*args, **options)


def tiny_config(cond: str) -> LlamaGenConfig:
    return LlamaGenConfig(
        dim=32,
        n_layer=2,
        n_head=2,
        grid=(4, 4),
        cond=cond,
        vocab_size=48,
        ffn_dim=64,
        num_classes=10,
        caption_tokens=6,
        caption_dim=12,
    )


def tiny_vq(seed: int = 0) -> VQTokenizer:
    """A VQ tokenizer with 48 codes; a code covers 2 x 2 pixels."""
    tokenizer = VQTokenizer(VQConfig(32, (1, 2), 1, 16, codebook_size=48, codebook_dim=8))
    randomize(tokenizer, seed)
    return tokenizer.eval().requires_grad_(False)


def tiny_llamagen(cond: str, seed: int = 0) -> LlamaGen:
    """A LlamaGen of 4x4 codes ("class" or "text") with a tokenizer, in eval mode."""
    backbone = LlamaGen(tiny_config(cond))
    randomize(backbone, seed)
    backbone.frozen.tokenizer = tiny_vq()
    return backbone.eval()


def tiny_janus(seed: int = 0) -> Janus:
    """A Janus of 4x4 codes with its tokenizers, in eval mode."""
    backbone = build_tiny_janus(
        JANUS_PROMPTS, tiny_vq(), side=4, dim=32, layers=2, heads=2, ffn_dim=64, vocab_size=320
    )
    randomize(backbone.janus, seed)
    with torch.no_grad():
        for layer in (m for m in backbone.janus.modules() if isinstance(m, nn.Linear)):
            if layer.bias is not None:
                layer.bias.sub_(1).mul_(0.2)  # larger biases would dominate the head's output
    return backbone.eval()


JANUS_PROMPTS = ("a red circle", "two squares and one star, left of the ring", "a")


def text_logits(model, backbone=None) -> torch.Tensor:
    """The language model's logits for a prompt's text: of the model itself (our backbone), or of
    transformers' `model` with the tokenizer of `backbone`.
    """
    ids = torch.tensor((backbone or model).prompts.encode([JANUS_PROMPTS[1]]))
    with torch.no_grad():
        return model.text_logits(ids) if backbone is None else model(input_ids=ids).logits


def tiny_rar(seed: int = 0) -> RAR:
    """A RAR of 4x4 codes with a tokenizer, in eval mode."""
    backbone = RAR(RARConfig(32, 2, 2, 64, grid=(4, 4), vocab_size=48, num_classes=10))
    tokenizer = MaskGITVQGAN(MaskGITConfig(32, (1, 2), 1, codebook_size=48, codebook_dim=16))
    for module in (backbone, tokenizer):
        randomize(module, seed)
    backbone.frozen.tokenizer = tokenizer.eval().requires_grad_(False)
    return backbone.eval()


def tiny_lfq(seed: int = 0) -> LFQTokenizer:
    """A look-up-free tokenizer with 2^7 codes; a code covers 2 x 2 pixels."""
    tokenizer = LFQTokenizer(LFQConfig(32, (1, 2), 1, bits=7))
    randomize(tokenizer, seed)
    return tokenizer.eval().requires_grad_(False)


def tiny_open_magvit2(seed: int = 0) -> OpenMAGVIT2:
    """An Open-MAGVIT2 of 4x4 codes, each two sub-tokens, with a tokenizer, in eval mode."""
    config = OpenMAGVIT2Config(
        dim=32,
        n_layer=2,
        n_intra_layer=2,
        n_head=2,
        grid=(4, 4),
        bits=(3, 4),
        ffn_dim=64,
        num_classes=10,
    )
    backbone = OpenMAGVIT2(config)
    randomize(backbone, seed)
    backbone.frozen.tokenizer = tiny_lfq()
    return backbone.eval()


BACKBONES = {
    "llamagen_class": lambda: tiny_llamagen("class"),
    "llamagen_text": lambda: tiny_llamagen("text"),
    "janus": tiny_janus,
    "open_magvit2": tiny_open_magvit2,
    "rar": tiny_rar,
}
"""Parameters of the `backbone` fixture: each family and kind of condition."""


def tiny_prepared(backbone: Backbone, batch: int) -> dict[str, Tensor]:
    """Prepared conditions that differ between rows: labels, or left-padded captions or prompts of
    different lengths.
    """
    if backbone.frozen.text_encoder is not None:
        return backbone.prepare([JANUS_PROMPTS[i % 3] for i in range(batch)])
    if backbone.spec.cond_kind == "class":
        return backbone.prepare([i % backbone.spec.num_classes for i in range(batch)])
    length, width = backbone.config.caption_tokens, backbone.config.caption_dim
    valid = 1 + torch.arange(batch) * 2 % length
    features = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))
    return backbone.collate_features([f[-n:] for f, n in zip(features, valid, strict=True)])


def tiny_codes(backbone: Backbone, *shape: int, seed: int = 0) -> Tensor:
    """Random codes [*shape, S]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randint(v, shape, generator=generator) for v in backbone.spec.subvocabs], dim=-1
    )


def other_codes(backbone: Backbone, codes: Tensor) -> Tensor:
    """Codes that differ from the given ones [..., S] in every sub-token."""
    return (codes + 1) % torch.tensor(backbone.spec.subvocabs)


def open_gates(model: TensorAR) -> TensorAR:
    """Make the codec's zero-initialized gates non-zero, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if name.endswith(("z_in", "z_out")):
                gate.normal_(generator=generator)
    return model


class Killed(Exception):
    """Raised where a process could be killed."""


def folder_content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by relative name."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def in_threads(work: Callable[[int], object], ranks: Sequence[int] = (0, 1)) -> list:
    """Run `work(rank)` for all ranks at once; return the results, or raise the first error."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """Yield the content of a JSON file, then write it back with the changes made to it."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def open_source(source: str | Path, **options) -> Source:
    """The data set of captioned images at `source`, read with these options."""
    return opening.open_source(CaptionedImages(str(source), **options))
