"""The recipes in words, for the command line."""

import dataclasses

from rich.table import Table

from keras_vit.training.recipes import RECIPES, TEXTS, named_recipe


def recipes_table():
    """All recipes, one a line.

    Returns:
        A `rich.table.Table`.
    """
    table = Table()
    table.add_column("recipe", no_wrap=True)
    for column in ("for", "model", "px", "epochs", "batch"):
        table.add_column(column)
    for name, recipe in RECIPES.items():
        table.add_row(
            name,
            recipe.purpose,
            _model(recipe),
            str(recipe.image_size or ""),
            str(recipe.epochs),
            str(recipe.batch_size),
        )
    return table


def recipe_details(name):
    """One recipe, a line for each of its fields.

    Args:
        name: A name of `RECIPES`.

    Returns:
        A `rich.table.Table`.

    Raises:
        ValueError: There is no such recipe.
    """
    recipe = named_recipe(name)
    table = Table("field", "value", title=name)
    for text in TEXTS:
        table.add_row(text, getattr(recipe, text))
    table.add_section()
    table.add_row("variant", _model(recipe))
    for field in dataclasses.fields(recipe):
        if field.name not in (*TEXTS, "variant"):
            table.add_row(field.name, str(getattr(recipe, field.name)))
    return table


def _model(recipe):
    variant = recipe.variant
    if variant is None:
        return "the checkpoint's"
    if isinstance(variant, str):
        return variant
    return (
        f"{variant.depth} blocks of width {variant.hidden_dim}, patches of {variant.patch_size} px"
    )
