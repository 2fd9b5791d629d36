"""Writes weight files of any size with random weights, tensor by tensor.

Only one block of numbers is in memory at a time. Matrices are N(0, 0.02), like the initial weights
of most of these models; biases are zero and other vectors one, so that activations stay finite.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from mmap import MAP_SHARED
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from t2i.files import replacing, write_json

Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = 1 << 24  # numbers drawn at once
_SAFE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def shapes_of(state_dict: Mapping[str, Tensor]) -> Shapes:
    """Names and shapes of a state dict, such as a module's on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


@dataclass
class RandomWeights:
    """Writes weight files.

    Attributes:
        holes: leave out the numbers: a file has its full size but takes hardly any disk space,
            which is enough to check names and shapes.
        seed: seeds all files together; each file continues the random numbers of the last one.
    """

    holes: bool = False
    seed: int = 0
    _generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self._generator = torch.Generator().manual_seed(self.seed)

    def pickle(
        self,
        path: Path,
        shapes: Shapes,
        *,
        nest: str | None,
        tied: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a .pt, .bin or .ckpt file in fp32, with the weights under the key `nest`.

        tied: for each weight that shares another weight's memory, the other's name.
        """
        # Nothing writes to these tensors, so the system never allocates their memory; skip_data
        # leaves their bytes in the file unwritten, too.
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        weights |= {name: weights[other] for name, other in (tied or {}).items()}
        with replacing(path) as temporary:
            with torch.serialization.skip_data():
                torch.save(weights if nest is None else {nest: weights}, temporary)
            if not self.holes:
                with torch.serialization.set_default_mmap_options(MAP_SHARED):
                    content = torch.load(temporary, mmap=True, weights_only=True)
                stored = content if nest is None else content[nest]
                for name, shape in shapes.items():
                    for block in stored[name].view(-1).split(_BLOCK):
                        self._fill(block, name, len(shape))
        return path

    def safetensors(self, path: Path, shapes: Shapes, dtype: torch.dtype) -> Path:
        """Write a .safetensors file."""
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            place = {"dtype": _SAFE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            header[name] = place
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the numbers must start at a multiple of eight bytes
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if self.holes:
                file.truncate(8 + len(text) + end)
            else:
                for name, shape in shapes.items():
                    for block in self._blocks(name, shape, dtype):
                        file.write(block.view(torch.uint8).numpy().data)
        return path

    def sharded(
        self, folder: Path, shapes: Shapes, dtype: torch.dtype, *, most: int = 5 * 10**9
    ) -> None:
        """Write model.safetensors, or shards with an index, in transformers' layout."""
        split = split_state_dict_into_shards_factory(
            dict(shapes),
            get_storage_size=lambda shape: math.prod(shape) * dtype.itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=most,
        )
        for file, names in split.filename_to_tensors.items():
            self.safetensors(folder / file, {name: shapes[name] for name in names}, dtype)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)

    def _blocks(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
        count = math.prod(shape)
        for start in range(0, count, _BLOCK):
            block = torch.empty(min(_BLOCK, count - start), dtype=dtype)
            self._fill(block, name, len(shape))
            yield block

    def _fill(self, block: Tensor, name: str, dims: int) -> None:
        if dims >= 2:
            block.normal_(0, 0.02, generator=self._generator)
        else:
            block.fill_(0.0 if name.endswith("bias") else 1.0)
