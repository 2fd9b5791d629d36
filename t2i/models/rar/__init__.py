"""RAR, class-conditional."""

from t2i.models.families import Family

FAMILY = Family("rar", "t2i.models.rar.rar_model:RAR")
