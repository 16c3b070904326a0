"""The command `keras-vit explain`: a page of what a run or a checkpoint looks at."""

import base64
import html.parser
import json
import os
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from test_cli import invoke

import keras_vit
from keras_vit import explain as measures
from keras_vit.data import load_data, read_image
from keras_vit.data.pipeline import resize
from keras_vit.training.explanation import DISCARD_RATIO, explain
from keras_vit.weights import save_checkpoint

CONFIG = keras_vit.ViTConfig(hidden_dim=16, depth=3, num_heads=2, mlp_dim=24, patch_size=4)
PRETRAINED = pathlib.Path(
    os.environ.get("KERAS_VIT_PRETRAINED")
    or pathlib.Path(__file__).parents[2] / "shared" / "pretrained"
)
FILES = {"attention_distance.png", "explanation.json", "index.html"}
FILES |= {"patch_filters.png", "position_similarity.png"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photographs, one below another folder, a hidden one, and no image."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for index, name in enumerate(["a <b>.png", "more/c.PNG", "z.jpg", ".hidden.png"]):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30 + index, 3))
        image = Image.fromarray(pixels.astype("uint8"))
        image.save(folder / name, format="JPEG" if name.endswith("jpg") else "PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Files of models with a head and without."""
    folder = tmp_path_factory.mktemp("weights")
    for name, classes in {"head": 7, "headless": 0}.items():
        keras.utils.set_random_seed(1)
        model = keras_vit.build_vit(CONFIG, image_size=12, num_classes=classes)
        if classes:
            model.get_layer("head").bias.assign(np.log([1.0, 1, 1, 9, 1, 1, 6]))
        save_checkpoint(model, folder / f"{name}.safetensors", "timm")
    return folder


def explain_checkpoint(path, *arguments):
    options = ("--num-heads", 2, "--normalization", "imagenet")
    return invoke("explain", path, *arguments, *options)


class Page(html.parser.HTMLParser):
    """What is on a page: its text, and its pictures by what is said in their place."""

    def __init__(self, path):
        super().__init__()
        self.pictures, self.text, self.addresses = {}, "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "img":
            data = attrs["src"].removeprefix("data:image/png;base64,")
            self.pictures[attrs["alt"]] = base64.b64decode(data, validate=True)

    def handle_data(self, data):
        self.text += data


def test_page_of_a_run(digits_run, tmp_path):
    """Pictures and predictions of digits, on a page that needs no other file."""
    for index, (image, label) in enumerate(load_data("digits").test.dataset.take(3)):
        Image.fromarray(image.numpy()).save(tmp_path / f"{index} is {int(label)}.png")
    before = sorted(digits_run.folder.rglob("*"))
    paths = sorted(tmp_path.iterdir())
    out = tmp_path / "pages" / "digits"
    said = invoke("explain", digits_run.folder, *paths, "--out", out)
    assert said.rstrip().endswith(f"-> {out / 'index.html'}")
    pictures = {f"0{n + 1}-{path.stem.replace(' ', '_')}.png" for n, path in enumerate(paths)}
    assert {path.name for path in out.iterdir()} == FILES | pictures
    assert sorted(digits_run.folder.rglob("*")) == before

    page = Page(out / "index.html")
    assert all(address.startswith("data:") for address in page.addresses)
    for path, name in zip(paths, sorted(pictures), strict=True):
        assert page.pictures[path.name] == (out / name).read_bytes()
    assert len(page.pictures) == 6

    info = json.loads((out / "explanation.json").read_text())
    assert [row["image"] for row in info["images"]] == [str(path) for path in paths]
    model = digits_run.model()
    images = np.stack([resize(read_image(path), (16, 16)) for path in paths])
    expected = keras.ops.convert_to_numpy(keras.ops.softmax(model(images)))
    for row, probabilities in zip(info["images"], expected, strict=True):
        best = np.argsort(-probabilities)[:5]
        assert [p["class"] for p in row["predictions"]] == [str(i) for i in best]
        np.testing.assert_allclose(
            [p["probability"] for p in row["predictions"]], probabilities[best], rtol=1e-4
        )
        assert f"{probabilities.max():.1%}" in page.text
    maps = measures.attention_maps(model, images)
    distances = measures.mean_attention_distance(maps, measures.patch_grid(model))
    np.testing.assert_allclose(info["mean_attention_distance"], distances, rtol=1e-4)


def test_page_of_a_checkpoint_without_a_head(checkpoints, photos, tmp_path):
    """No prediction; folders are looked through; names are not markup."""
    out = tmp_path / "out"
    said = explain_checkpoint(checkpoints / "headless.safetensors", photos, "--out", out)
    assert "z.jpg: drawn as 03-z.png" in said
    page = Page(out / "index.html")
    assert list(page.pictures)[:3] == ["a <b>.png", "c.PNG", "z.jpg"]
    assert "a <b>.png" in page.text
    assert "<table" not in (out / "index.html").read_text()
    info = json.loads((out / "explanation.json").read_text())
    assert [row["predictions"] for row in info["images"]] == [[], [], []]
    assert info["image_size"] == [12, 12]


def test_page_of_a_checkpoint_with_a_head(checkpoints, photos, tmp_path):
    """Classes have numbers; the first images alone; another size."""
    out = tmp_path / "out"
    arguments = (photos, "--out", out, "--count", 1, "--image-size", "24,12")
    said = explain_checkpoint(checkpoints / "head.safetensors", *arguments)
    assert "the first 1 of 3 images" in said
    assert "class 3 0.450, class 6 0.300, class" in said
    info = json.loads((out / "explanation.json").read_text())
    assert [row["file"] for row in info["images"]] == ["01-a_b_.png"]
    assert info["image_size"] == [24, 12]


def test_page_of_a_hybrid_has_no_filters(photos, tmp_path, monkeypatch):
    config = keras_vit.ViTConfig(16, 1, 2, 24, 1, stem_units=(1,), stem_width=32)
    model = keras_vit.build_vit(config, image_size=16, num_classes=0, normalization="imagenet")
    monkeypatch.setattr(
        "keras_vit.training.explanation.load_backbone", lambda *args, **kwargs: model
    )
    page = explain("hybrid.npz", [photos], tmp_path / "out", count=1)
    assert page == tmp_path / "out" / "index.html"
    assert len(Page(page).pictures) == 3
    assert {path.name for path in page.parent.iterdir()} == (FILES - {"patch_filters.png"}) | {
        "01-a_b_.png"
    }


def test_what_was_drawn_among_the_pictures_is_none(digits_run, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    out = folder / "looks"
    pages = [
        explain(digits_run.folder, [folder], out, count=99, overwrite=overwrite).read_text()
        for overwrite in (False, True)
    ]
    assert pages[0] == pages[1]


def test_run_at_another_size(digits_run, photos, tmp_path):
    invoke("explain", digits_run.folder, photos, "--out", tmp_path / "x", "--image-size", "24,16")
    info = json.loads((tmp_path / "x" / "explanation.json").read_text())
    assert info["image_size"] == [24, 16]


def test_what_is_there_is_kept(checkpoints, photos, tmp_path):
    out, source = tmp_path / "out", checkpoints / "headless.safetensors"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"mine is not a folder that `explain` wrote"):
        explain_checkpoint(source, photos, "--out", tmp_path / "mine", "--overwrite")
    with pytest.raises(ValueError, match=r"mine exists already: pass .*--overwrite"):
        explain_checkpoint(source, photos, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "index.html").read_text() == "mine"
    explain_checkpoint(source, photos / "z.jpg", "--out", out)
    explain_checkpoint(source, photos / "a <b>.png", "--out", out, "--overwrite")
    assert {path.name for path in out.iterdir()} == FILES | {"01-a_b_.png"}


def test_nothing_is_left_of_a_page_that_fails(checkpoints, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_vit.training.explanation._page", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain_checkpoint(checkpoints / "headless.safetensors", photos, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_images(checkpoints, photos, tmp_path):
    source, out = checkpoints / "headless.safetensors", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Received: .*empty, no \.jpg.*in it"):
        explain_checkpoint(source, photos, tmp_path / "empty", "--out", out)
    with pytest.raises(ValueError, match=r"Received: .*none\.png, nothing there"):
        explain_checkpoint(source, tmp_path / "none.png", "--out", out)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1 of 4 images.*--skip-unreadable.*x\.png"):
        explain_checkpoint(source, tmp_path / "bad", photos, "--out", out)
    with pytest.raises(ValueError, match=r"1 of 1 images cannot be read"):
        explain_checkpoint(source, tmp_path / "bad", "--out", out, "--skip-unreadable")
    assert not out.exists()
    said = explain_checkpoint(
        source, tmp_path / "bad", photos / "z.jpg", "--out", out, "--skip-unreadable"
    )
    assert re.search(r"skipped: .*x\.png", said)
    assert (out / "01-z.png").exists()


def test_file_whose_name_is_no_text(checkpoints, photos, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copy(os.fsencode(photos / "z.jpg"), path)
    said = explain_checkpoint(
        checkpoints / "head.safetensors", os.fsdecode(path), "--out", tmp_path / "out"
    )
    assert f"{tmp_path}/caf\ufffd.jpg: class 3 " in said
    [row] = json.loads((tmp_path / "out" / "explanation.json").read_text())["images"]
    assert (row["image"], row["file"]) == (f"{tmp_path}/caf\ufffd.jpg", "01-caf_.png")
    assert "caf\ufffd.jpg" in (tmp_path / "out" / "index.html").read_text()


def test_errors_of_sources(digits_run, photos, tmp_path):
    with pytest.raises(ValueError, match=r"no-such-file"):
        invoke("explain", tmp_path / "no-such-file.npz", photos, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"are for checkpoints: a run has its own.*num_heads=2"):
        invoke("explain", digits_run.folder, photos, "--out", tmp_path / "o", "--num-heads", 2)
    with pytest.raises(ValueError, match=r"`count` must be a positive int.*count=0"):
        explain(digits_run.folder, [photos], tmp_path / "out", count=0)


@pytest.mark.skipif(
    not PRETRAINED.is_dir(), reason="no pretrained DINOv2: set KERAS_VIT_PRETRAINED to its folder"
)
def test_a_real_model_looks_at_the_flower(tmp_path):
    """The flower of scikit-learn's photograph, orange on green, gets most of both maps."""
    photo = sklearn.datasets.load_sample_image("flower.jpg")
    model = keras_vit.from_checkpoint(
        PRETRAINED / "dinov2_vits14.safetensors",
        num_classes=0,
        num_heads=6,
        image_size=224,
        normalization="imagenet",
    )
    image = np.asarray(resize(photo, (224, 224)), "float32")
    maps, grid = measures.attention_maps(model, image[None]), measures.patch_grid(model)
    patches = image.reshape(16, 14, 16, 14, 3).mean(axis=(1, 3))
    flower = patches[..., 0] > patches[..., 2] + 40  # red above blue
    assert 0.1 < flower.mean() < 0.35
    rollout = measures.attention_rollout(maps, grid, discard_ratio=DISCARD_RATIO)[0]
    last = measures.class_attention(maps, grid)[0].mean(axis=0)
    for heat in (rollout, last):
        assert heat[flower].sum() / heat.sum() > 0.6
