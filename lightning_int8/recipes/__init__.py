"""Recipes: one published method per file, found by the file's name. A recipe is data: ``RECIPE = Recipe(...)``."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import yaml

from lightning_int8.recipe_mapping import recipe_from_mapping
from lightning_int8.spec import Recipe


def names() -> list[str]:
    """Names of the recipes, one per file of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(recipe: str | Path | Recipe) -> Recipe:
    """Return a recipe by its name, by the path of a YAML file, or as given.

    A file may name another as its ``base``, by a path that starts from its own folder.

    Raises:
        ValueError: Neither; the message lists the names there are, or gives the field of the file that is wrong.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | Path):
        raise ValueError(f"recipe: {recipe!r} is not a name, a path or a Recipe")
    if str(recipe) in names():
        return importlib.import_module(f"{__name__}.{recipe}").RECIPE
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return _read(path, ())
    raise ValueError(f"recipe: {str(recipe)!r} is not one of {', '.join(names())}, nor a path to a .yaml file")


def _read(path: Path, above: tuple[Path, ...]) -> Recipe:
    """The recipe of a file that is the base of ``above``."""
    try:
        if path.resolve() in above:
            raise ValueError("base: the file is its own base, directly or through others")
        data = yaml.safe_load(path.read_text())
        if not isinstance(data, dict):
            return recipe_from_mapping(data)
        base = data.pop("base", None)
        if isinstance(base, str) and base.endswith((".yaml", ".yml")):
            base = _read(path.parent / base, (*above, path.resolve()))
        return recipe_from_mapping({"name": path.stem, **data}, None if base is None else get(base))
    except OSError as error:
        raise ValueError(f"recipe: cannot read {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"recipe file {str(path)!r}: {error}") from error
