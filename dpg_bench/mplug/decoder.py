"""mPLUG's answer decoder, and the beam search that reads answers from it.

The search follows the reference (`models/multi_modal/mplug/predictor.py` of modelscope at 2905da1),
not `transformers`:
- candidates are compared by log-probability / ((5 + length) / 6)^0.6, and the penalty is undone
  before the next step;
- the search ends when the best beam ends. The other four beams then count as ended, too, and the
  answer is the best of all hypotheses that have ended so far: an earlier, shorter one can win;
- a beam that ends without being the best still continues, past its end token;
- at the last step, every beam counts as ended.

Shapes: Q questions, K beams, L text tokens, N image tokens, S = N + L, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpg_bench.mplug.bert import Bert, BertConfig, KeysValues

LENGTH_PENALTY = 0.6
NEVER = -1e20  # the reference's log-probability of the end token before min_length


@dataclass(frozen=True)
class Hypothesis:
    """An answer that the search found: ids, including the start token, and score."""

    ids: list[int]
    score: float


@dataclass
class DecoderState:
    """The decoder's state between steps: keys and values per layer.

    memory: those of [image; text], each [Q, H, S, d]; memory_mask: bool [Q, 1, 1, S].
    own: those of the tokens so far, each [Q * K, H, length, d].
    """

    memory: list[KeysValues]
    memory_mask: Tensor
    own: list[KeysValues]

    @property
    def length(self) -> int:
        return self.own[0][0].shape[2] if self.own else 0


class AnswerDecoder(nn.Module):
    """A causal BERT that attends to [image; text] and takes one token per step."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.bert = Bert(config, config.text_decode_layers, cross=True)
        predictions = _Predictions(config.hidden_size, config.vocab_size, config.layer_norm_eps)
        # As in the reference, the output matrix is the word embedding.
        predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.cls = nn.ModuleDict({"predictions": predictions})

    def remember(self, image: Tensor, text_QLD: Tensor, mask_QL: Tensor) -> DecoderState:
        """The state before the first token. image: [1 or Q, N, D]."""
        memory = []
        for layer in self.bert.encoder:
            cross = layer.crossattention
            assert cross is not None, "every layer of this decoder has cross-attention"
            memory.append(_join(cross.keys_values(image), cross.keys_values(text_QLD)))
        mask = F.pad(mask_QL[:, None, None], (image.shape[1], 0), value=True)
        return DecoderState(memory, mask, [])

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Logits [Q * K, V] after one more token per beam (int64 [Q * K]); extends the state."""
        x = self.bert.embeddings(tokens[:, None], state.length)
        own = []
        for index, layer in enumerate(self.bert.encoder):
            new = layer.attention.keys_values(x)
            if state.own:
                new = _join(state.own[index], new)
            own.append(new)
            x = layer(x, new, None, state.memory[index], state.memory_mask)
        state.own = own
        return self.cls["predictions"](x[:, 0])


def _join(first: KeysValues, second: KeysValues) -> KeysValues:
    """Concatenate along the sequence; a `first` of batch size 1 serves all rows of `second`."""
    (k1, v1), (k2, v2) = first, second
    rows = len(k2)
    keys = torch.cat([k1.expand(rows, -1, -1, -1), k2], dim=2)
    return keys, torch.cat([v1.expand(rows, -1, -1, -1), v2], dim=2)


class _Predictions(nn.Module):
    """BERT's masked-token head, used here to predict the next token."""

    def __init__(self, width: int, vocab: int, eps: float):
        super().__init__()
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=eps)}
        )
        self.decoder = nn.Linear(width, vocab)
        self.bias = self.decoder.bias  # stored under both names

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))))


def decode(
    decoder: AnswerDecoder,
    state: DecoderState,
    *,
    beams: int,
    max_length: int,
    min_length: int,
    start: int,
    end: int,
) -> list[list[Hypothesis]]:
    """Beam search for every question of `state`; see `beam_search`."""

    def next_logits(tokens_QK: Tensor, origin_QK: Tensor | None) -> Tensor:
        if origin_QK is not None:
            first = torch.arange(0, origin_QK.numel(), beams, device=origin_QK.device)
            rows = (first[:, None] + origin_QK).flatten()
            state.own = [(k[rows], v[rows]) for k, v in state.own]
        return decoder.step(tokens_QK.flatten(), state).unflatten(0, tokens_QK.shape)

    questions, device = len(state.memory_mask), state.memory_mask.device
    starts = torch.full((questions, beams), start, device=device)
    return beam_search(next_logits, starts, max_length=max_length, min_length=min_length, end=end)


def beam_search(
    next_logits: Callable[[Tensor, Tensor | None], Tensor],
    starts_QK: Tensor,
    *,
    max_length: int,
    min_length: int,
    end: int,
) -> list[list[Hypothesis]]:
    """The best K hypotheses of each question, best first.

    next_logits(tokens [Q, K], origin [Q, K]): logits [Q, K, V] after these tokens; origin is the
        index of the beam that each token continues (None at first, when all beams are equal).
    """
    questions, beams = starts_QK.shape
    tokens_QK, origin_QK, sequences_QKT = starts_QK, None, starts_QK[..., None]
    log_probs_QK = torch.full((questions, beams), -torch.inf, device=starts_QK.device)
    log_probs_QK[:, 0] = 0  # all beams are equal at first: only one counts
    ended: list[list[Hypothesis]] = [[] for _ in range(questions)]
    searching = set(range(questions))
    for step in range(max_length):
        log_probs_QKV = next_logits(tokens_QK, origin_QK).float().softmax(dim=-1).log()
        if step < min_length:
            log_probs_QKV[..., end] = NEVER
        penalty = ((5 + step + 1) / 6) ** LENGTH_PENALTY
        candidates = (log_probs_QKV + log_probs_QK[..., None]) / penalty
        scores_QK, chosen_QK = candidates.flatten(1).topk(beams, dim=-1)
        vocab = log_probs_QKV.shape[-1]
        log_probs_QK = scores_QK * penalty
        origin_QK, tokens_QK = chosen_QK // vocab, chosen_QK % vocab
        kept = sequences_QKT.gather(1, origin_QK[..., None].expand_as(sequences_QKT))
        sequences_QKT = torch.cat([kept, tokens_QK[..., None]], dim=-1)
        finished_QK = (tokens_QK == end).tolist()
        for question in sorted(searching):
            over = finished_QK[question][0] or step + 1 == max_length
            for beam in range(beams):
                if over or finished_QK[question][beam]:
                    ids = sequences_QKT[question, beam].tolist()
                    ended[question].append(Hypothesis(ids, scores_QK[question, beam].item()))
            if over:
                searching.discard(question)
        if not searching:
            break
    return [sorted(found, key=lambda h: h.score, reverse=True)[:beams] for found in ended]
