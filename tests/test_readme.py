"""The README's Python example runs as it stands, and its claims about the tables hold."""

import pathlib
import re

import pytest

from keras_vit import VARIANTS
from keras_vit.training import RECIPES
from keras_vit.training.building import build_model, model_arguments

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_python_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    result = names["result"]
    result.check()
    [reference, file] = result.rows
    assert min(reference.accuracy, file.accuracy) > 0.7
    assert "dynamic_int8" in capsys.readouterr().out
    assert (tmp_path / "digits.tflite").exists()


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)


def test_every_variant_has_its_line():
    section = README.split("## Variants")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    named = {}
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row[0]):
            named[name] = tuple(int(cell) for cell in row[1:5])
    assert named == {
        name: (config.hidden_dim, config.depth, config.num_heads, config.mlp_dim)
        for name, config in VARIANTS.items()
    }


@pytest.mark.parametrize("variant", ["Ti/16", "S/16", "B/16", "L/16", "H/14", "g/14", "G/14"])
def test_multiplications_are_as_stated(variant):
    """Projection, then qkv and output, q k^T and A v, and the MLP of each block, then the head."""
    config = VARIANTS[variant]
    d, patches = config.hidden_dim, (224 // config.patch_size) ** 2
    tokens = patches + 1
    block = tokens * (4 * d * d + 2 * d * config.mlp_dim) + 2 * tokens**2 * d
    macs = patches * 3 * config.patch_size**2 * d + config.depth * block + 1000 * d
    [row] = re.findall(rf"^\|.*`{variant}`.*$", README, re.MULTILINE)
    assert row.split("|")[-2].strip() == f"{macs / 1e9:.2f}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_as_described(name):
    [row] = re.findall(rf"^\| `{name}` \|(.*)$", README, re.MULTILINE)
    if RECIPES[name].variant is None:
        assert f"{RECIPES[name].epochs} epochs" in row
        assert {"adamw": "AdamW", "sgd": "SGD"}[RECIPES[name].optimizer] in row
        assert (f"{RECIPES[name].image_size} px" if RECIPES[name].image_size else "its own") in row
        return
    model = build_model(model_arguments(RECIPES[name], 10), RECIPES[name])
    millions = float(re.search(r"([\d.]+) M", row)[1])
    assert round(model.count_params() / 1e6, 1) == millions
    assert row.split("|")[-2].strip() == f"{RECIPES[name].image_size} px"
