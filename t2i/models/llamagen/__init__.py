"""LlamaGen, class- and text-conditional."""

from t2i.models.families import Family

FAMILY = Family(
    "llamagen",
    "t2i.models.llamagen.llamagen_model:LlamaGen",
    text_encoder="t2i.models.llamagen.t5:T5Captions",
    text_encoder_parameters={"google/flan-t5-xl": 1_223_527_424},  # the encoder half
)
