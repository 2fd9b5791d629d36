"""Janus-Pro as a text-to-image generator (arXiv 2501.17811; deepseek-ai/Janus, transformers'
`models/janus`).

A Llama reads [prompt | image codes]: the prompt through its token embedding, codes through a
separate table and a small MLP. A separate head predicts codes. Three things matter for parity:

- the unconditional prompt keeps BOS and begin-of-image, and the padding between them is attended
  to; only the padding left of a prompt is masked;
- the image tokenizer is our `VQTokenizer`: transformers' copy does not normalize when encoding, so
  it gives different codes;
- the padding token's embedding is trained: it makes up most of the unconditional prompt.

Shapes: B batch, L inputs, P prompt tokens, D width, T image tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from t2i.errors import UserError, naming
from t2i.models.base import AS_PUBLISHED, BackboneSpec, LoadOptions
from t2i.models.blocks import LlamaBackbone
from t2i.models.conditions import Condition, to_device
from t2i.models.janus import janus_config
from t2i.models.janus import janus_weights as names
from t2i.models.janus.janus_config import JanusShape
from t2i.models.janus.janus_modules import JanusModel, LanguageModel, rope_table
from t2i.models.janus.janus_prompts import IMAGE, MAX_TOKENS, JanusPrompts
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.sampling import SamplingConfig
from t2i.weights import load_strict, read_folder, reading_shape

log = logging.getLogger(__name__)

_FIXED_TEXTS = (
    "Why is the sky blue?",
    "Write two sentences about a red bicycle that leans against a wall.",
    "What is three times four, and how do you know?",
)
"""Training on images should not change how the model continues these."""
_UNDERSTANDING = ("model.vision_model.", "model.aligner.", "lm_head.")


class Janus(LlamaBackbone):
    config_type, tokenizer_type = JanusShape, VQTokenizer
    lora_targets = (
        r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    )

    def __init__(self, config: JanusShape, *, generation_only: bool = False):
        """`generation_only`: without the understanding tower, its aligner and the text head."""
        super().__init__(config.trunk)
        assert config.grid is not None, "settled by JanusShape"
        self.config = config
        with torch.device("meta"):
            self.janus = JanusModel(config)
        if generation_only:
            tied = (self.janus.lm_head,) if config.transformers["tie_word_embeddings"] else ()
            modules = (m for m in self._understanding() if m not in tied)
            self.left_out = sum(p.numel() for m in modules for p in m.parameters())
            del self.janus.model.vision_model, self.janus.model.aligner, self.janus.lm_head
        self.spec = BackboneSpec(
            family="janus",
            dim=config.trunk.dim,
            num_heads=config.trunk.n_head,
            grid=config.grid,
            subvocabs=(config.codes["num_embeddings"],),
            cond_kind="text",
            prefix_tokens=min(MAX_TOKENS, self._positions - config.grid[0] * config.grid[1]),
            sampling=SamplingConfig(cfg_scale=5.0),
        )

    # -- modules -----------------------------------------------------------------------------------
    @property
    def language_model(self) -> LanguageModel:
        return self.janus.model.language_model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.language_model.layers

    @property
    def _positions(self) -> int:
        return self.config.text["max_position_embeddings"]

    @property
    def lora_root(self) -> nn.Module:
        return self.janus

    def _understanding(self) -> tuple[nn.Module, ...]:
        model = self.janus.model
        parts = (getattr(model, "vision_model", None), getattr(model, "aligner", None))
        return tuple(m for m in (*parts, getattr(self.janus, "lm_head", None)) if m is not None)

    def image_layers(self) -> dict[str, nn.Module]:
        kinds = ("generation_embeddings", "generation_aligner", "generation_head")
        return {f"model.{kind}": getattr(self.janus.model, kind) for kind in kinds}

    def trained_modules(self) -> Sequence[nn.Module]:
        return (self.language_model, *self.image_layers().values())

    def parts(self) -> dict[str, Sequence[nn.Module]]:
        understanding = self._understanding()
        return {
            "language model": (self.language_model,),
            "image layers": tuple(self.image_layers().values()),
            **({"understanding": understanding} if understanding else {}),
        }

    # -- files -------------------------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path, options: LoadOptions = AS_PUBLISHED) -> Self:
        """Load a published folder in DeepSeek's or transformers' layout, strictly, with its image
        and prompt tokenizers.

        `generation_only` leaves out the understanding tower, its aligner and the text head;
        `shapes_only` reads only the shapes of the weights.
        """
        folder, config = Path(path), options.config
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder: Janus-Pro is published as a folder with config.json, "
                "weights and tokenizer.json"
            )
        weights = names.to_transformers(read_folder(folder, shapes_only=options.shapes_only))
        stored = config.transformers if config else janus_config.read_config(folder, weights)
        # A missing setting means True to transformers, whatever weights the file holds.
        without_head = names.HEAD not in weights
        tied = without_head and stored.get("tie_word_embeddings", True)
        if without_head and not (tied or options.generation_only):
            raise UserError(
                f"{folder} lacks {names.HEAD}, and its config.json does not tie it to the embedding: "
                "download it again, or load it only for drawing (generation_only)"
            )
        with naming(folder), reading_shape("a Janus-Pro"):
            if tied:
                weights[names.HEAD] = weights[names.EMBEDDING]
        own = names.vq_weights(weights)
        tokenizer = VQTokenizer.empty(own, folder)
        load_strict(tokenizer, own, folder)
        prompts = JanusPrompts.load(folder)
        known: dict = {"tie_word_embeddings": tied}
        if (image := prompts.tokenizer.token_to_id(IMAGE)) is not None:
            known["image_token_id"] = image
        shape = JanusShape(stored | known, options.grid or (config.grid if config else None))
        with naming(folder):
            janus_config.check_codes(shape, tokenizer.config)
            prompts.check_ids(shape.text["vocab_size"])
        backbone = cls(shape, generation_only=options.generation_only)
        prompts.max_tokens = backbone.spec.prefix_tokens
        backbone.frozen.text_encoder = prompts
        backbone.frozen.tokenizer = tokenizer
        other = (names.VQ, *_UNDERSTANDING) if options.generation_only else (names.VQ,)
        kept = {k: v.to(options.dtype) for k, v in weights.items() if not k.startswith(other)}
        load_strict(backbone.janus, kept, folder, assign=True)
        if tied and not options.generation_only:
            backbone.janus.lm_head.weight = backbone.language_model.embed_tokens.weight
        if backbone.left_out:
            log.info(
                "not loaded: understanding tower, aligner and text head (%.2f GB), which drawing "
                "images does not need",
                backbone.left_out * options.dtype.itemsize / 1e9,
            )
        return backbone.eval()

    @classmethod
    def outline(cls, source: str | Path, options: LoadOptions = AS_PUBLISHED) -> Self | None:
        size = janus_config.PUBLISHED.get(str(source))
        if size is None:
            return None
        shape: JanusShape = options.config or janus_config.published_shape(size)
        shape = replace(shape, grid=options.grid or shape.grid)
        backbone = cls(shape, generation_only=options.generation_only)
        backbone.frozen.tokenizer = VQTokenizer.outline()
        return backbone

    def official_state_dict(self) -> dict[str, Tensor]:
        weights = self.janus.state_dict()
        return {k: v for k, v in weights.items() if not k.startswith(_UNDERSTANDING)}

    def save_official(self, folder: Path, dtype: torch.dtype) -> Path:
        if self.left_out:
            raise UserError(
                "a Janus loaded with generation_only lacks parts of the published folder; load it without generation_only"
            )
        weights = self.janus.state_dict() | names.vq_to_transformers(self.tokenizer.state_dict())
        weights = {name: value.detach().to("cpu", dtype) for name, value in weights.items()}
        names.save_folder(
            folder, weights, self.config.transformers, self.prompts, self.spec.sampling
        )
        return folder

    # -- the condition -----------------------------------------------------------------------------
    @property
    def prompts(self) -> JanusPrompts:
        if self.frozen.text_encoder is None:
            raise UserError("this Janus has no prompt tokenizer; load it from its published folder")
        return self.frozen.text_encoder

    def prepare(self, conditions: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
        ids, mask = self.prompts.batch(conditions, length)
        null = self.prompts.unconditional(ids, mask)
        prepared = {"ids": ids, "null_ids": null, "mask": mask}
        return {name: to_device(value, self.device) for name, value in prepared.items()}

    def made_up_conditions(self, batch: int, length: int) -> dict[str, Tensor]:
        ids = torch.full((batch, length), 5, device=self.device)
        return {"ids": ids, "null_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}

    def prefix_length(self, conditions: Sequence[str]) -> int:
        return max((len(ids) for ids in self.prompts.encode(conditions)), default=0)

    def caption_features(self) -> None:
        """Returns None: captions stay text, as tokenizing takes almost no time."""

    def caption_notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        known = self.frozen.text_encoder is not None  # None if only shapes were read
        return self.prompts.notes(captions) if known else super().caption_notes(captions)

    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        ids = prepared["ids"]
        if drop is not None:
            ids = torch.where(drop[:, None], prepared["null_ids"], ids)
        return Condition(self.language_model.embed_tokens(ids), mask=prepared["mask"])

    # -- the model ---------------------------------------------------------------------------------
    def embed_tokens(self, codes: Tensor) -> Tensor:
        model = self.janus.model
        return model.generation_aligner(model.generation_embeddings(codes[..., 0]))

    def finish(self, x: Tensor, *shared: Tensor) -> Tensor:
        return self.language_model.norm(x)

    def rope_table(self) -> Tensor:
        return rope_table(self.trunk_shape, self._positions)

    def head(self, h: Tensor, earlier: Tensor) -> tuple[Tensor, nn.Module]:
        head = self.janus.model.generation_head
        return head.read(h), head.vision_head

    def text_logits(self, ids: Tensor) -> Tensor:
        """Logits [B, L, words] of the next word after each id int64 [B, L], as in the published
        model.

        Raises:
            UserError: the text head was left out.
        """
        if self.left_out:
            raise UserError(
                "a Janus loaded with generation_only has no text head; load it without generation_only"
            )
        words = self.language_model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.janus.lm_head(self.trunk(words, positions, Condition(words[:, :0])))

    def fixed_text_logits(self) -> Tensor | None:
        if self.left_out:
            return None
        texts = (torch.tensor([self.prompts.encode([text])[0]]) for text in _FIXED_TEXTS)
        return torch.cat([self.text_logits(ids.to(self.device))[0] for ids in texts])

    # -- pixels ------------------------------------------------------------------------------------
    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        """Janus truncates where LlamaGen rounds."""
        return ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
