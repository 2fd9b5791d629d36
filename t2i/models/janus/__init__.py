"""Janus-Pro, as a text-to-image generator."""

from t2i.models.families import Family

FAMILY = Family(
    "janus",
    "t2i.models.janus.janus_model:Janus",
    published_as_folder=True,
    prompt_file="tokenizer.json",
    model_types=("janus", "multi_modality"),  # transformers' layout, DeepSeek's
    library="transformers",
    library_usage=(
        "from transformers import JanusForConditionalGeneration",
        'base = JanusForConditionalGeneration.from_pretrained("OWNER/NAME")  # without TensorAR',
    ),
)
