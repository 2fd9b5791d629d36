"""Writing a Janus-Pro folder for transformers' `JanusForConditionalGeneration.from_pretrained`."""

import shutil
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from t2i.fields import read_object
from t2i.files import write_json
from t2i.models.janus import janus_weights as names
from t2i.models.janus.janus_prompts import JanusPrompts
from t2i.sampling import SamplingConfig

# What transformers' JanusProcessor reads besides the tokenizer; only a folder in its own layout has
# them.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


def save_folder(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict,
    prompts: JanusPrompts,
    sampling: SamplingConfig,
) -> None:
    """Write configuration, weights (sharded where large), tokenizer and generation settings.

    Args:
        weights: every weight of the model under transformers' names, in the type to be stored.
        config: the content of config.json, but for the type of the weights.
        sampling: becomes the folder's default for drawing images.
    """
    if config["tie_word_embeddings"]:  # one tensor, stored once
        weights = {name: value for name, value in weights.items() if name != names.HEAD}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    kind = {"model_type": "janus", "architectures": ["JanusForConditionalGeneration"]}
    dtype = str(weights[names.EMBEDDING].dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | kind | {"dtype": dtype})
    generation = {
        "bos_token_id": prompts.bos_id,
        "eos_token_id": prompts.tokenizer.token_to_id(prompts.eos),
        "pad_token_id": prompts.pad_id,
        "do_sample": True,
        "guidance_scale": sampling.cfg_scale,
        "temperature": sampling.temperature or 1.0,
        "top_k": sampling.top_k,  # 0 has to be said, or transformers takes 50
        "top_p": sampling.top_p,
        "generation_kwargs": {"boi_token_id": prompts.boi_id},
    }
    write_json(folder / "generation_config.json", generation)
    prompts.save(folder)
    if prompts.folder is not None and _is_transformers(prompts.folder):
        for name in _PROCESSOR_FILES:
            if (prompts.folder / name).is_file():
                shutil.copyfile(prompts.folder / name, folder / name)


def _is_transformers(folder: Path) -> bool:
    return read_object(folder / "config.json").get("model_type") == "janus"
