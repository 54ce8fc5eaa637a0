"""Reading a recipe: the TOML file, the changes of `--set`, and errors that name the key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from simlm.errors import RecipeError, nearest
from simlm.recipe.recipe import Recipe
from simlm.recipe.section import Section


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe. overrides: `section.key=value`, values as TOML writes them (bare words are strings).

    Raises RecipeError naming file and key; for an unknown key it suggests the nearest known one.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `simlm init FOLDER` writes one for your data") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: this is a folder, a recipe (a .toml file) was expected; `simlm init {path}` writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    for override in overrides or []:
        _apply(raw, override)
    raw.setdefault("name", path.stem)
    return parse_recipe(raw, where=str(path))


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe given as a dictionary (as TOML reads it)."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override}: expected section.key=value, for example --set retriever1.temperature=0.05")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {section!r} is a value, not a section")
    table[last] = value


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1])
            lines.append(f"unknown key {place!r}{nearest(str(item['loc'][-1]), known)} (known here: {', '.join(sorted(known))})")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(item.get("input"), dict) else f" (found {item.get('input')!r})"
            lines.append(f"{place or 'recipe'}: {message}{shown}")
    return f"{where}: " + f"\n{where}: ".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        # Of `Section | None` the section.
        kinds = [one for one in get_args(field.annotation) if isinstance(one, type) and issubclass(one, Section)]
        model = kinds[0] if kinds else field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
