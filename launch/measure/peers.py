"""Other implementations of the same shapes: textbook loops, transformers and LlamaGen's own.

No code of LlamaGen is copied here: it is imported from a checkout that the user names.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.measure.textbook import Textbook
from launch.measure.turns import Contender, Loop, Single, Tick
from t2i.errors import UserError
from t2i.models.base import Backbone
from t2i.models.janus.janus_model import Janus
from t2i.models.llamagen.llamagen_model import LlamaGen
from t2i.sampling import SamplingConfig
from t2i.tensorar.sampler import encode_rows

PEERS = {
    "no-cache": "textbook loop that recomputes all earlier codes (one step per turn)",
    "cat-cache": "textbook loop that appends to its keys and values",
    "transformers": "transformers' generate: a Llama of the same shape with random weights and as "
    "many rows, each sampled separately; for Janus, its own image loop on the same weights",
    "transformers-static": "the same Llama with transformers' static cache",
    "llamagen": "LlamaGen's own generate on the same weights (--llamagen)",
    "llamagen-compiled": "the same with its --compile (reduce-overhead)",
}


@dataclass(frozen=True)
class Task:
    """What to draw: the same for all contenders of a group."""

    backbone: Backbone
    prepared: dict[str, Tensor]
    images: int
    sampling: SamplingConfig
    llamagen: Path | None = None
    """A checkout of LlamaGen's repository."""

    @property
    def guided(self) -> bool:
        return self.sampling.cfg_scale != 1

    @property
    def rows(self) -> int:
        return self.images * (2 if self.guided else 1)


def open_peer(name: str, task: Task) -> Contender | None:
    """A contender by name; None if there is none for this shape."""
    if isinstance(task.backbone, Janus) and name == "transformers":
        return _janus(task)
    if isinstance(task.backbone, LlamaGen):
        return _FOR_LLAMAGEN[name](task)
    return None


# -- textbook loops --------------------------------------------------------------------------------


@torch.no_grad()
def _textbook(task: Task) -> Textbook:
    assert isinstance(task.backbone, LlamaGen)
    condition = encode_rows(task.backbone, task.prepared, guided=task.guided)
    return Textbook(task.backbone, condition, task.sampling)


def _no_cache(task: Task) -> Contender:
    book, device = _textbook(task), task.backbone.device
    codes = torch.randint(book.config.vocab_size, (task.images, book.tokens), device=device)
    return Single(lambda index: book.recomputing(codes[:, :index]), device)


def _cat_cache(task: Task) -> Contender:
    return Loop(_textbook(task).appending, task.backbone.device)


# -- transformers ----------------------------------------------------------------------------------


@contextmanager
def _ticking(module: nn.Module, tick: Tick) -> Iterator[None]:
    """Call `tick` before every pass of a module."""
    handle = module.register_forward_pre_hook(lambda *_: tick())
    try:
        yield
    finally:
        handle.remove()


def _placed(model: nn.Module, backbone: Backbone) -> Any:
    """The model in eval mode, on the backbone's device and in its dtype."""
    first = next(backbone.parameters())
    return model.to(first.device, first.dtype).eval()


def _llama(task: Task, cache: str | None = None) -> Contender:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert isinstance(task.backbone, LlamaGen)
    shape, tokens = task.backbone.config, task.backbone.spec.num_tokens
    prefix = shape.prefix_tokens
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=prefix + tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = _placed(LlamaForCausalLM(config), task.backbone)
    ids = torch.ones(task.rows, prefix, dtype=torch.long, device=task.backbone.device)
    settings: dict = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    settings |= {"top_k": task.sampling.top_k, "max_new_tokens": tokens}
    if cache is not None:
        settings["cache_implementation"] = cache

    def draw(tick: Tick) -> None:
        with _ticking(model, tick):
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    return Loop(draw, task.backbone.device, records=cache is not None and ids.is_cuda)


def transformers_janus(backbone: Janus) -> Any:
    """transformers' own model with a backbone's weights. Parts that drawing codes does not use stay
    random.
    """
    from transformers import JanusConfig, JanusForConditionalGeneration

    model = JanusForConditionalGeneration(JanusConfig.from_dict(backbone.config.transformers))
    report = model.load_state_dict(backbone.janus.state_dict(), strict=False)
    assert not report.unexpected_keys, report.unexpected_keys
    return _placed(model, backbone)


def _janus(task: Task) -> Contender:
    assert isinstance(task.backbone, Janus)
    draw = partial(draw_janus, transformers_janus(task.backbone), task)
    return Loop(draw, task.backbone.device)


def draw_janus(model: Any, task: Task, tick: Tick) -> Tensor:
    """Draw codes [B, T] with transformers' image loop."""
    from transformers import GenerationConfig

    words = task.backbone.frozen.text_encoder
    sampling = task.sampling
    config = GenerationConfig(
        **({"do_sample": True, "top_k": sampling.top_k} if sampling.temperature else {}),
        guidance_scale=sampling.cfg_scale,
        pad_token_id=0 if words is None else words.pad_id,
        bos_token_id=1 if words is None else words.bos_id,
        generation_kwargs={"boi_token_id": 2 if words is None else words.boi_id},
    )
    given = {"input_ids": task.prepared["ids"], "attention_mask": task.prepared["mask"].long()}
    with _ticking(model.model.language_model, tick):
        return model.generate(**given, generation_mode="image", generation_config=config)


# -- LlamaGen --------------------------------------------------------------------------------------


class _Counted:
    """LlamaGen's model, wrapped for its `generate`, with a tick before every pass."""

    def __init__(self, model: Any, call: Callable, tick: Tick):
        self._model, self._call, self._tick = model, call, tick

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs) -> Any:
        self._tick()
        return self._call(*args, **kwargs)


def _llamagen(task: Task, *, compiled: bool = False) -> Contender | None:
    assert isinstance(task.backbone, LlamaGen)
    shape = task.backbone.config
    if task.llamagen is None or shape.cond != "class" or shape.ffn_dim is not None:
        return None
    gpt, generate = _import_llamagen(task.llamagen)
    model, device = llamagen_model(gpt, task.backbone), task.backbone.device
    call = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    draw = partial(draw_llamagen, generate, model, call, task)
    return Loop(draw, device, records=compiled)


def check_llamagen(folder: Path) -> None:
    """UserError unless the folder has LlamaGen's code."""
    if not (folder / "autoregressive" / "models" / "gpt.py").is_file():
        raise UserError(f"--llamagen {folder} is no checkout of LlamaGen's repository")


def _import_llamagen(folder: Path) -> tuple[Any, Any]:
    """LlamaGen's modules for the model and for drawing."""
    check_llamagen(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    where = "autoregressive.models"
    return import_module(f"{where}.gpt"), import_module(f"{where}.generate")


def llamagen_model(gpt: Any, backbone: LlamaGen) -> Any:
    """LlamaGen's own model with a backbone's weights."""
    shape = backbone.config
    arguments = gpt.ModelArgs(
        dim=shape.dim,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        vocab_size=shape.vocab_size,
        num_classes=shape.num_classes,
        block_size=backbone.spec.num_tokens,
        cls_token_num=shape.prefix_tokens,
        model_type="c2i",
    )
    model = gpt.Transformer(arguments)
    model.load_state_dict(backbone.official_state_dict())
    return _placed(model, backbone)


def draw_llamagen(generate: Any, model: Any, call: Callable, task: Task, tick: Tick) -> Tensor:
    """Draw codes [B, T] with LlamaGen's `generate`."""
    sampling, greedy = task.sampling, task.sampling.temperature == 0
    return generate.generate(
        _Counted(model, call, tick),
        task.prepared["labels"],
        task.backbone.spec.num_tokens,
        cfg_scale=sampling.cfg_scale,
        top_k=sampling.top_k,
        temperature=1.0,
        top_p=1.0,
        sample_logits=not greedy,
    )


_FOR_LLAMAGEN: dict[str, Callable[[Task], Contender | None]] = {
    "no-cache": _no_cache,
    "cat-cache": _cat_cache,
    "transformers": _llama,
    "transformers-static": partial(_llama, cache="static"),
    "llamagen": _llamagen,
    "llamagen-compiled": partial(_llamagen, compiled=True),
}
