"""Open-MAGVIT2, class-conditional."""

from t2i.models.families import Family

FAMILY = Family(
    "open_magvit2",
    "t2i.models.open_magvit2.open_magvit2_model:OpenMAGVIT2",
    tokenizer_inside=True,
)
