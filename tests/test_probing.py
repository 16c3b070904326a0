"""probe(): the three classifiers against independent computations, the stored features, errors."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import sklearn.linear_model
from PIL import Image

import keras_vit
from keras_vit import ViTConfig, build_vit
from keras_vit.data import load_data
from keras_vit.data.pipeline import spread_images
from keras_vit.training import fewshot, probing
from keras_vit.training.probing import (
    C_GRID,
    ProbeResult,
    extract_features,
    knn_classes,
    logistic_regression,
    plot_probe,
    probe,
)
from keras_vit.weights.sources import sha256

CLASSES = 3


def clusters(count, seed, width=7, spread=1.0):
    """Features of three classes around three centres, and their labels."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, width))
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % CLASSES)
    features = centres[labels] + spread * random.normal(size=(count, width))
    return features.astype("float32"), labels


def save_tiny_model(path, seed=0):
    """Writes a checkpoint of a tiny model with random weights."""
    keras.utils.set_random_seed(seed)
    model = build_vit(
        ViTConfig(20, 2, 5, 28, 4), image_size=8, num_classes=3, normalization="minus_one_one"
    )
    keras_vit.save_checkpoint(model, path, family="timm")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def probe_digits(weights, out, **arguments):
    """A probe of 130 training and 50 test images; the validation split has 180."""
    arguments = {"train_images": 130, "test_images": 50, "num_heads": 5, **arguments}
    return probe(weights, "digits", out, **arguments)


@pytest.fixture(scope="module")
def probed(weights, tmp_path_factory):
    """A `ProbeResult` and its folder. Tests must not change the folder."""
    out = tmp_path_factory.mktemp("probed") / "probe"
    return probe_digits(weights, out), out


@pytest.fixture
def extractions(monkeypatch):
    """The number of images of each extraction of features."""
    counts = []

    def counting(model, split, count, *rest):
        counts.append(count)
        return extract_features(model, split, count, *rest)

    monkeypatch.setattr(probing, "extract_features", counting)
    return counts


def test_knn_is_a_weighted_vote_of_the_most_similar():
    features, labels = clusters(40, seed=1)
    others, _ = clusters(23, seed=2, spread=2.0)
    expected = []
    for other in others.astype("float64"):
        cosines = [
            x @ other / (np.linalg.norm(x) * np.linalg.norm(other))
            for x in features.astype("float64")
        ]
        votes = [0.0] * CLASSES
        for index in sorted(range(40), key=lambda i: -cosines[i])[:6]:
            votes[labels[index]] += np.exp(cosines[index] / 0.07)
        expected.append(int(np.argmax(votes)))
    assert len(set(expected)) == CLASSES
    classes = knn_classes(features, labels, others, CLASSES, k=6)
    np.testing.assert_array_equal(classes, expected)


def test_knn_weights_decide():
    """One very similar neighbour of class 1 outweighs two of class 0."""
    features = np.array([[1.0, 0.02], [0.7, 0.7], [0.7, 0.7]])
    classes = knn_classes(features, np.array([1, 0, 0]), np.array([[1.0, 0.0]]), 2, k=3)
    assert classes == [1]


@pytest.mark.parametrize(("images", "width"), [(5, 11), (11, 5)])
def test_ridge_minimises_its_loss(images, width):
    """As the least squares of the system extended by sqrt(l2) I."""
    random = np.random.default_rng(3)
    x, y = random.normal(size=(images, width)), random.normal(size=(images, 3))
    extended = np.concatenate([x, np.sqrt(2.5) * np.eye(width)])
    expected, *_ = np.linalg.lstsq(extended, np.concatenate([y, np.zeros((width, 3))]))
    np.testing.assert_allclose(fewshot.ridge(x, y, 2.5), expected, rtol=1e-10, atol=1e-12)


def test_least_squares_standardises_and_has_a_bias():
    """Scale and shift of a feature change nothing; a constant one does no harm."""
    features, labels = clusters(60, seed=4)
    others, other_labels = clusters(50, seed=5)
    classes = fewshot.least_squares(features, labels, others, CLASSES)
    assert np.mean(classes == other_labels) > 0.75

    mean, std = features.mean(axis=0), features.std(axis=0)
    x = np.column_stack([(features - mean) / std, np.full(60, 100.0)])
    targets = np.where(labels[:, None] == np.arange(CLASSES), 1.0, -1.0)
    w = np.linalg.inv(x.T @ x + 1024 * np.eye(8)) @ x.T @ targets
    scores = np.column_stack([(others - mean) / std, np.full(50, 100.0)]) @ w
    np.testing.assert_array_equal(classes, scores.argmax(axis=1))

    def changed(x):
        return np.column_stack([1e3 * x + 50, np.full(len(x), 7.0)])

    again = fewshot.least_squares(changed(features), labels, changed(others), CLASSES)
    np.testing.assert_array_equal(again, classes)


def test_few_shot_draws():
    labels = np.random.default_rng(6).permutation(np.repeat([0, 1, 2], [10, 12, 30]))
    for shots in (1, 5, 10):
        drawn = fewshot.draw(labels, CLASSES, shots, seed=1)
        assert len(set(drawn)) == CLASSES * shots
        assert np.bincount(labels[drawn]).tolist() == [shots] * CLASSES
        np.testing.assert_array_equal(drawn, fewshot.draw(labels, CLASSES, shots, seed=1))
        assert set(drawn) != set(fewshot.draw(labels, CLASSES, shots, seed=2))
    few, more = (set(fewshot.draw(labels, CLASSES, shots, seed=1)) for shots in (1, 5))
    assert few < more

    features, _ = clusters(52, seed=7)
    accuracies = fewshot.few_shot_accuracies((features, labels), (features, labels), CLASSES)
    assert {shots: len(draws) for shots, draws in accuracies.items()} == {1: 3, 5: 3, 10: 3}
    labels[labels == 1] = 0
    assert fewshot.few_shot_accuracies((features, labels), (features, labels), CLASSES) == {}


def test_few_shot_learns_more_from_more():
    train, test = clusters(300, seed=8, spread=1.5), clusters(400, seed=9, spread=1.5)
    accuracies = fewshot.few_shot_accuracies(train, test, CLASSES)
    assert list(accuracies) == [1, 5, 10, 25]
    means = [np.mean(draws) for draws in accuracies.values()]
    assert means[0] < means[1] < means[3]
    assert means[3] > 0.7


@pytest.mark.parametrize(("images", "best"), [(30, 1e-1), (90, 1e-5)])
def test_c_is_chosen_on_the_validation_images(images, best):
    """The one with the best accuracy; of several, as for 90 images, the smallest."""
    train, validation, test = (clusters(n, seed=n, spread=1.8) for n in (images, 71, 83))
    result = logistic_regression(train, validation, test)
    assert [fit["C"] for fit in result["fits"]] == list(C_GRID)
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    accuracies = {}
    for c in C_GRID:
        classifier = sklearn.linear_model.LogisticRegression(C=c, tol=1e-8, max_iter=10_000)
        classifier.fit((train[0] - mean) / std, train[1])
        accuracies[c] = [
            np.mean(classifier.predict((features - mean) / std) == labels)
            for features, labels in (validation, test)
        ]
    for fit in result["fits"]:
        assert fit["validation"] == pytest.approx(accuracies[fit["C"]][0])
        assert fit["converged"]
    assert max(accuracies, key=lambda c: (accuracies[c][0], -c)) == best
    assert result["C"] == best
    assert [result["validation"], result["accuracy"]] == pytest.approx(accuracies[best])


def test_missing_convergence_is_shown(weights, probed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probing, "MAX_ITERATIONS", 1)
    result = probe_digits(weights, shutil.copytree(probed[1], tmp_path / "probe"))
    assert not result.logistic["converged"]
    assert "did not converge in 1 iterations" in capsys.readouterr().out


def test_features_are_the_models(weights):
    """Images from all over the split, each once and in order, whatever the size of the batches."""
    model = keras_vit.from_checkpoint(weights, num_classes=0, num_heads=5)
    split = load_data("digits").validation
    done = []
    features, labels = extract_features(model, split, 45, 20, done.append)
    images, expected_labels = spread_images(split, (8, 8), 45)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(features, model(images.astype("float32")), atol=1e-5)
    assert done == [20, 40, 45]


def test_probe_folder(weights, probed):
    result, out = probed
    names = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    splits = ("train", "validation", "test")
    assert names == {"probe.json", "probe.png", *(f"features/{name}.npz" for name in splits)}
    with Image.open(out / "probe.png") as image:
        assert image.size[0] > 900

    info = json.loads((out / "probe.json").read_text())
    assert info["info"]["weights"] == str(weights)
    assert info["info"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert info["info"]["data"] == "digits"
    assert info["info"]["fingerprint"] == load_data("digits").fingerprint
    assert info["info"]["images"] == {"train": 130, "validation": 180, "test": 50}
    assert info["info"]["width"] == 20
    assert info["info"]["model"]["image_size"] == [8, 8]
    assert info["info"]["model"]["variant"]["num_heads"] == 5
    assert info["info"]["model"]["normalization"] == [[0.5], [0.5]]
    assert info["info"]["versions"]["keras"] == keras.__version__
    assert info["knn"] == {"k": 20, "accuracy": result.knn["accuracy"]}
    assert info["logistic"] == result.logistic
    assert info["few_shot"] == {str(shots): draws for shots, draws in result.few_shot.items()}
    assert set(info["seconds"]) == {"features", "knn", "logistic", "few_shot"}


def test_accuracies_are_of_the_stored_features(probed):
    result, out = probed
    files = [np.load(out / "features" / f"{name}.npz") for name in ("train", "validation", "test")]
    train, validation, test = [(file["features"], file["labels"]) for file in files]
    assert [len(labels) for _, labels in (train, validation, test)] == [130, 180, 50]
    split = load_data("digits").test
    np.testing.assert_array_equal(test[1], spread_images(split, (8, 8), 50)[1])
    knn = np.mean(knn_classes(*train, test[0], 10, 20) == test[1])
    assert result.knn["accuracy"] == pytest.approx(knn)
    assert result.logistic == logistic_regression(train, validation, test)
    assert result.few_shot == fewshot.few_shot_accuracies(train, test, 10)
    assert list(result.few_shot) == [1, 5]
    assert result.logistic["accuracy"] > 0.5  # of ten classes, with random weights


def test_features_are_computed_once(weights, probed, tmp_path, extractions):
    result, out = probed
    folder = shutil.copytree(out, tmp_path / "probe")
    again = probe_digits(weights, folder)
    assert extractions == []
    assert same_result(again, result)

    # As if the call had been interrupted in the validation split.
    (folder / "features" / "validation.npz").unlink()
    (folder / "features" / "test.npz").unlink()
    (folder / "probe.json").unlink()
    assert same_result(probe_digits(weights, folder), result)
    assert extractions == [180, 50]


def same_result(a, b):
    return (a.info, a.knn, a.logistic, a.few_shot) == (b.info, b.knn, b.logistic, b.few_shot)


def test_other_arguments_replace_when_asked(weights, probed, tmp_path, extractions):
    folder = shutil.copytree(probed[1], tmp_path / "probe")
    with pytest.raises(ValueError, match=r"test\.npz holds .* other images: .* images=60, not 50"):
        probe_digits(weights, folder, test_images=60)
    other = save_tiny_model(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ValueError, match=r"train\.npz holds features of other weights: pass over"):
        probe_digits(other, folder)
    with pytest.raises(ValueError, match=r"features of other image_size: .*\[12, 12\], not \[8"):
        probe_digits(weights, folder, image_size=12)
    with pytest.raises(
        ValueError, match=r"features of other normalization: .*0\.406.*, not \[\[0\.5"
    ):
        probe_digits(weights, folder, normalization="imagenet")
    assert extractions == []
    assert (folder / "probe.json").read_bytes() == (probed[1] / "probe.json").read_bytes()

    result = probe_digits(weights, folder, test_images=60, overwrite=True)
    assert extractions == [60]  # of the other splits nothing has changed
    assert result.info["images"]["test"] == 60
    result = probe_digits(other, folder, test_images=60, overwrite=True)
    assert extractions == [60, 130, 180, 60]
    assert (
        json.loads((folder / "probe.json").read_text())["info"]["sha256"]
        != probed[0].info["sha256"]
    )


def test_pixels_of_a_checkpoint_that_does_not_say(tmp_path):
    """Without a normalisation of its own, the model does not take pixels as they come."""
    model = keras_vit.build_vit(
        ViTConfig(20, 1, 5, 24, 4), image_size=8, num_classes=2, normalization=None
    )
    keras_vit.save_checkpoint(model, tmp_path / "raw.safetensors", "timm")
    with pytest.warns(UserWarning, match=r"does not say its normalization: took 'minus_one_one'"):
        result = probe(
            tmp_path / "raw.safetensors", "digits", tmp_path / "out", train_images=40, test_images=9
        )
    assert result.info["model"]["normalization"] == [[0.5], [0.5]]


def test_other_data_are_refused(weights, probed, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (9, 9), (index, 0, 0)).save(
                tmp_path / "photos" / name / f"{index}.png"
            )
    with pytest.raises(ValueError, match=r"holds features of other data, images: pass overwrite"):
        probe(weights, f"folder:{tmp_path / 'photos'}", probed[1], num_heads=5)


def test_what_is_no_probe_is_kept(weights, probed, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.jpg").write_text("mine")
    for out in (tmp_path / "photos", tmp_path / "photos" / "photo.jpg"):
        with pytest.raises(ValueError, match=r"exists and is not the folder of a probe: choose"):
            probe_digits(weights, out, overwrite=True)
    assert (tmp_path / "photos" / "photo.jpg").read_text() == "mine"
    folder = shutil.copytree(probed[1], tmp_path / "probe")
    (folder / "features" / "train.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.npz holds features of other weights, data"):
        probe_digits(weights, folder)


def test_small_data_and_missing_classes(weights, tmp_path, capsys):
    """Of 12 training images none is of some digits."""
    result = probe_digits(weights, tmp_path / "probe", train_images=12, test_images=5000)
    _, labels = spread_images(load_data("digits").train, (8, 8), 12)
    missing = sorted(set(range(10)) - set(labels.tolist()))
    assert missing
    assert result.knn["k"] == 12
    assert result.few_shot == {}
    assert result.info["images"]["test"] == load_data("digits").test.count
    out = capsys.readouterr().out
    assert f"no training image is of the class {missing[0]}" in out
    assert "12 of 1,257 train, 180 validation, 360 test images" in out
    assert "test: 360 images, " in out
    plot_probe(result)


def test_one_class_cannot_be_probed(weights, tmp_path):
    with pytest.raises(ValueError, match=r"at least two classes: raise .*Received: train_images=1"):
        probe_digits(weights, tmp_path / "probe", train_images=1)
    assert list(tmp_path.iterdir()) == []


def test_features_must_be_finite(weights, tmp_path):
    model = keras_vit.from_checkpoint(weights, num_heads=5)
    model.get_layer("encoder_norm").gamma.assign(np.full(20, 3e38))  # finite, unlike its products
    path = tmp_path / "large.safetensors"
    keras_vit.save_checkpoint(model, path, family="timm")
    with pytest.raises(ValueError, match=r"must be finite: .* NaN for 130 of 130 train images"):
        probe_digits(path, tmp_path / "probe")
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize("name", ["train_images", "test_images", "batch_size"])
def test_counts_must_be_positive(weights, tmp_path, name):
    with pytest.raises(ValueError, match=rf"`{name}` must be a positive int. Received: {name}=0"):
        probe_digits(weights, tmp_path / "probe", **{name: 0})


def test_hash_is_of_all_that_makes_a_checkpoint(tmp_path):
    """Of a sharded one, by its index or its folder; what else lies there does not count."""
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "model-1.safetensors"
    index.write_text("{}")
    shard.write_bytes(b"abc")
    first = sha256(tmp_path)
    assert sha256(index) == first
    assert sha256(shard) == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "readme.md").write_text("x")
    assert sha256(index) == first
    shard.write_bytes(b"abd")
    assert len({sha256(index), sha256(tmp_path), first}) == 2


def test_picture():
    result = ProbeResult(
        info={"data": "digits", "width": 20, "images": {"train": 1234, "test": 5}},
        knn={"k": 20, "accuracy": 0.75},
        logistic={"accuracy": 0.875, "C": 0.1},
        few_shot={1: [0.25, 0.5, 0.75], 5: [0.5, 0.5, 0.5]},
        seconds={},
    )
    [axes] = plot_probe(result).axes
    few_shot, knn, logistic = axes.lines
    assert few_shot.get_xydata().tolist() == [[1, 0.5], [5, 0.5]]
    assert set(knn.get_ydata()) == {0.75}
    assert set(logistic.get_ydata()) == {0.875}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5"]
    assert "1,234" in axes.get_legend().get_texts()[1].get_text()


def test_command(weights, probed, tmp_path):
    command = pathlib.Path(sys.executable).with_name("keras-vit")
    out = tmp_path / "probe"
    arguments = f"--data digits --weights {weights} --out {out} --num-heads 5 --image-size 8"
    arguments += " --train-images 130 --test-images 50 --batch-size 64"
    done = subprocess.run(
        [command, "probe", *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "130 of 1,257 train, 180 validation, 50 of 360 test images" in text
    assert "images/s" in text
    assert f"-> {out}" in text
    result = json.loads((out / "probe.json").read_text())
    assert result["knn"] == probed[0].knn
    assert f"{result['logistic']['accuracy']:.4f}" in text
