"""What all sections of a recipe have in common: they are strict, and they count with the same numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A section: no unknown keys, no silent conversions of type, never changed after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
