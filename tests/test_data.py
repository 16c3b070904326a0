"""Data sources: pixels, labels and splits of real files, and every error."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from keras_vit.data import ImageData, decode_image, load_data, read_image
from keras_vit.data import progress as progress_module
from keras_vit.data import tfds as tfds_module
from keras_vit.data.images import check_image
from keras_vit.data.records import scan_records

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SPLITS = ("train", "validation", "test")


def save(image, path, **options):
    """Saves a Pillow image or an array, making the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def solid(value, size=(5, 3)):
    return Image.new("RGB", size, (value, value, value))


def fill_class(root, name, count, value=0, suffix=".png"):
    """Fills a class with images that are all different: gray levels from `value` on."""
    for index in range(count):
        save(solid(value + index), root / name / f"{name}-{index:03d}{suffix}")


def grays(split):
    """The `(gray level, label)` of every image of a split of solid images, in order."""
    return [(int(image[0, 0, 0]), int(label)) for image, label in split.dataset]


def load_one(split, index, window=None):
    """An image of a split, and its label, read in a graph."""
    return tf.function(split.load)(tf.constant(index, tf.int64), window)


@pytest.fixture
def two_classes(tmp_path):
    """Class "cat" with 20 images of gray 0..19, class "dog" with 30 of gray 100..129."""
    fill_class(tmp_path, "cat", 20)
    fill_class(tmp_path, "dog", 30, value=100)
    return tmp_path


class TestReadImage:
    def test_rgb_png_is_exact(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
        image = read_image(save(pixels, tmp_path / "a.png"))
        assert image.dtype == np.uint8
        assert image.flags.writeable
        np.testing.assert_array_equal(image, pixels)

    @pytest.mark.parametrize("mode", ["L", "1"])
    def test_gray_is_repeated(self, tmp_path, mode):
        pixels = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
        path = save(Image.fromarray(pixels).convert(mode), tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(path), np.stack([pixels] * 3, axis=-1))

    def test_palette(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, *BLUE])
        image.putpixel((1, 0), 1)
        assert read_image(save(image, tmp_path / "a.gif")).tolist() == [[[*RED], [*BLUE]]]

    def test_palette_with_alpha_is_composited_over_white(self, tmp_path):
        path = save_palette_with_alpha(tmp_path / "a.png")
        # Opaque red, blue at alpha 51 = 0.2 (0.8 of the white shows), fully transparent green.
        assert read_image(path).tolist() == [[[*RED], [204, 204, 255], [*WHITE]]]

    @pytest.mark.parametrize(
        ("mode", "pixel", "expected"),
        [
            ("RGBA", (0, 100, 200, 255), [0, 100, 200]),
            ("RGBA", (0, 100, 200, 0), [255, 255, 255]),
            ("RGBA", (0, 100, 200, 102), [153, 193, 233]),  # 0.4 of it over 0.6 of white
            ("LA", (50, 102), [173, 173, 173]),
        ],
    )
    def test_alpha_is_composited_over_white(self, tmp_path, mode, pixel, expected):
        path = save(Image.new(mode, (4, 2), pixel), tmp_path / "a.png")
        assert np.abs(read_image(path).astype(int) - expected).max() <= 1

    def test_transparent_gray_level(self, tmp_path):
        image = Image.fromarray(np.array([[7, 8]], np.uint8))
        path = save(image, tmp_path / "a.png", transparency=7)
        assert read_image(path)[0, :, 0].tolist() == [255, 8]

    def test_16_bit_gray_is_scaled_and_rounded(self, tmp_path):
        wide = np.array([[0, 128, 129, 257, 256, 32768], [65535, 65407, 65406, 514, 300, 1]])
        image = read_image(save(wide.astype(np.uint16), tmp_path / "a.png"))
        expected = [[0, 0, 1, 1, 1, 128], [255, 255, 254, 2, 1, 0]]  # round(value / 257)
        for channel in range(3):
            assert image[..., channel].tolist() == expected

    def test_16_bit_gray_with_a_transparent_level(self, tmp_path):
        wide = Image.fromarray(np.array([[514, 515]], np.uint16))
        path = save(wide, tmp_path / "a.png", transparency=514)
        assert read_image(path)[0, :, 0].tolist() == [255, 2]

    def test_32_bit_gray_in_16_bit_range_is_scaled(self, tmp_path):
        path = save(Image.fromarray(np.array([[0, 65535]], np.int32)), tmp_path / "a.tiff")
        assert read_image(path)[0, :, 0].tolist() == [0, 255]

    def test_16_bit_rgb_keeps_the_high_byte(self, tmp_path):
        wide = np.array([[[0x1234, 0xFFFF, 0x00FF], [0x8000, 0x0100, 0x7F80]]], np.uint16)
        path = tmp_path / "a.png"
        path.write_bytes(tf.io.encode_png(wide).numpy())
        assert read_image(path).tolist() == [[[0x12, 0xFF, 0x00], [0x80, 0x01, 0x7F]]]

    def test_cmyk_jpeg(self, tmp_path):
        cyan_and_yellow = Image.new("CMYK", (16, 16), (255, 0, 255, 0))
        image = read_image(save(cyan_and_yellow, tmp_path / "a.jpg", quality=95))
        assert np.abs(image.astype(int) - GREEN).max() <= 3

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
    def test_exif_orientation(self, tmp_path, orientation, suffix):
        path = save_oriented(tmp_path / f"a{suffix}", orientation)
        image = read_image(path)
        with Image.open(path) as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
        np.testing.assert_array_equal(image, expected)
        assert check_image(path)[:2] == image.shape[:2]

    def test_exif_quarter_turn_moves_the_corners(self, tmp_path):
        # Stored with red at the top left and green at the top right; orientation 6 says that
        # the stored left side is the top: red goes to the top right, green to the bottom right.
        image = read_image(save_oriented(tmp_path / "a.png", 6)).astype(int)
        assert image.shape == (48, 32, 3)
        assert image[0, -1].tolist() == [*RED]
        assert image[-1, -1].tolist() == [*GREEN]
        assert image[0, 0].tolist() == [*BLUE]
        assert image[-1, 0].tolist() == [*WHITE]

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_exif_is_ignored(self, tmp_path):
        path = save(solid(9), tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
        assert read_image(path).tolist() == np.full((3, 5, 3), 9).tolist()

    @pytest.mark.parametrize("suffix", [".gif", ".webp"])
    def test_animation_gives_the_first_frame(self, tmp_path, suffix):
        frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
        options = {"lossless": True} if suffix == ".webp" else {}
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert read_image(path)[0, 0].tolist() == [*RED]

    def test_bytes_and_file_give_the_same(self, tmp_path):
        path = save_oriented(tmp_path / "a.jpg", 5)
        np.testing.assert_array_equal(decode_image(path.read_bytes(), "a.jpg"), read_image(path))


class TestUnreadableImages:
    def test_missing(self, tmp_path):
        with pytest.raises(ValueError, match=r"Cannot read image '.*none\.jpg': No such file"):
            read_image(tmp_path / "none.jpg")

    def test_empty(self, tmp_path):
        path = tmp_path / "a.jpg"
        path.touch()
        with pytest.raises(ValueError, match=r"a\.jpg': the file is empty"):
            read_image(path)

    def test_text(self):
        with pytest.raises(ValueError, match=r"'note\.jpg': not an image in one of the formats"):
            decode_image(b"a note, not a picture", "note.jpg")

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
    def test_truncated(self, tmp_path, suffix):
        noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
        data = save(noise, tmp_path / f"a{suffix}").read_bytes()
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(data[: len(data) * 2 // 3])
        for read in (read_image, check_image):
            with pytest.raises(ValueError, match=rf"Cannot read image '.*cut\{suffix}'"):
                read(path)

    def test_decompression_bomb(self, tmp_path, monkeypatch):
        path = save(solid(0, (40, 30)), tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        with pytest.raises(ValueError, match=r"a\.png'.*decompression bomb"):
            read_image(path)

    def test_float(self, tmp_path):
        path = save(np.zeros((2, 3), np.float32), tmp_path / "a.tiff")
        with pytest.raises(ValueError, match="floating-point images are not supported"):
            read_image(path)

    def test_gray_out_of_range(self, tmp_path):
        path = save(Image.fromarray(np.array([[3, 70000]], np.int32)), tmp_path / "a.tiff")
        with pytest.raises(ValueError, match=r"in \[0, 65535\].*values from 3 to 70000"):
            read_image(path)


def save_palette_with_alpha(path):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *BLUE, *GREEN])
    for column in range(3):
        image.putpixel((column, 0), column)
    return save(image, path, transparency=bytes([255, 51, 0]))


def save_oriented(path, orientation):
    """A lossless-looking 48x32 image of four quadrants, stored with an EXIF orientation."""
    image = Image.new("RGB", (48, 32), WHITE)
    image.paste(RED, (0, 0, 24, 16))
    image.paste(GREEN, (24, 0, 48, 16))
    image.paste(BLUE, (0, 16, 24, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(path.suffix, {})
    return save(image, path, exif=exif, **options)


class TestSpec:
    @pytest.mark.parametrize(
        "spec", ["mnist", "digits:8", "folder:", "folder", "tfds:", "tfrecord:", "s3:x"]
    )
    def test_unknown(self, spec):
        forms = r'"digits", "folder:PATH", "tfrecord:PATH" or "tfds:NAME\[:CONFIG\]"'
        with pytest.raises(ValueError, match=rf"`spec` must be {forms}\. Received: spec='{spec}'"):
            load_data(spec)

    def test_folder_without_its_prefix(self, tmp_path):
        with pytest.raises(ValueError, match=rf'Did you mean "folder:{tmp_path}"\?$'):
            load_data(str(tmp_path))

    def test_wrong_type(self):
        with pytest.raises(TypeError, match=r"`spec` must be a string.*Received: spec=8"):
            load_data(8)


class TestDigits:
    @pytest.fixture(scope="class")
    def digits(self):
        return load_data("digits")

    def test_facts(self, digits):
        assert isinstance(digits, ImageData)
        assert digits.name == "digits"
        assert digits.class_names == tuple("0123456789")
        assert digits.num_classes == 10
        assert digits.image_size == (8, 8)
        assert digits.skipped == {}
        assert [getattr(digits, name).count for name in SPLITS] == [1257, 180, 360]
        spec = (tf.TensorSpec((8, 8, 3), tf.uint8), tf.TensorSpec((), tf.int32))
        assert digits.train.dataset.element_spec == spec

    def test_every_digit_is_in_one_split(self, digits):
        from sklearn import datasets

        source = datasets.load_digits()
        expected = Counter(
            (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
            for image, label in zip(source.images, source.target, strict=True)
        )
        found = Counter()
        for name in SPLITS:
            images, labels = next(iter(getattr(digits, name).dataset.batch(2000)))
            assert len(labels) == getattr(digits, name).count
            assert (images.numpy() == images.numpy()[..., :1]).all()
            found.update(
                (image[..., 0].tobytes(), int(label))
                for image, label in zip(images.numpy(), labels.numpy(), strict=True)
            )
        assert found == expected

    def test_stratified(self, digits):
        for name in SPLITS:
            split = getattr(digits, name)
            counts = Counter(int(label) for _, label in split.dataset.as_numpy_iterator())
            assert max(counts.values()) - min(counts.values()) <= 0.015 * split.count + 2

    def test_same_again(self, digits):
        again = load_data("digits")
        assert again.fingerprint == digits.fingerprint
        first, second = (next(iter(data.test.dataset.batch(360))) for data in (digits, again))
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(ValueError, match=r'pip install scikit-learn, or "\.\[train\]"'):
            load_data("digits")


class TestFolder:
    def test_splits_hold_each_image_once_with_its_label(self, two_classes):
        data = load_data(f"folder:{two_classes}")
        assert data.name == f"folder:{two_classes}"
        assert data.class_names == ("cat", "dog")
        assert data.image_size == (3, 5)
        seen = [pair for name in SPLITS for pair in grays(getattr(data, name))]
        expected = [(gray, 0) for gray in range(20)] + [(gray, 1) for gray in range(100, 130)]
        assert sorted(seen) == expected

    def test_splits_are_stratified_80_10_10(self, two_classes):
        data = load_data(f"folder:{two_classes}")
        for name, cats, dogs in (("train", 16, 24), ("validation", 2, 3), ("test", 2, 3)):
            split = getattr(data, name)
            assert split.count == cats + dogs
            assert Counter(label for _, label in grays(split)) == {0: cats, 1: dogs}

    def test_elements(self, two_classes):
        dataset = load_data(f"folder:{two_classes}").train.dataset
        spec = (tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int32))
        assert dataset.element_spec == spec
        image, _ = next(iter(dataset))
        assert image.shape == (3, 5, 3)

    def test_same_in_another_process(self, two_classes):
        data = load_data(f"folder:{two_classes}")
        here = [data.fingerprint, *([list(p) for p in grays(getattr(data, n))] for n in SPLITS)]
        script = (
            "import sys, json\nfrom keras_vit.data import load_data\n"
            "data = load_data(sys.argv[1])\n"
            "splits = [[[int(i[0, 0, 0]), int(y)] for i, y in s.dataset]\n"
            "          for s in (data.train, data.validation, data.test)]\n"
            "print(json.dumps([data.fingerprint, *splits]))\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, f"folder:{two_classes}"],
            env={**os.environ, "PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(result.stdout.splitlines()[-1]) == here

    def test_fingerprint_is_of_the_content_not_of_the_place(self, tmp_path):
        prints = []
        for place, count in (("a", 3), ("b", 3), ("c", 4)):
            fill_class(tmp_path / place, "x", 3)
            fill_class(tmp_path / place, "y", count)
            prints.append(load_data(f"folder:{tmp_path / place}").fingerprint)
        assert prints[0] == prints[1] != prints[2]
        assert len(prints[0]) == 64

    def test_new_images_move_few_others(self, two_classes):
        before = load_data(f"folder:{two_classes}")
        fill_class(two_classes, "mouse", 5, value=200)
        save(solid(50), two_classes / "cat" / "new.png")
        after = load_data(f"folder:{two_classes}")
        places = [
            {pair: name for name in SPLITS for pair in grays(getattr(data, name))}
            for data in (before, after)
        ]
        moved = [pair for pair, name in places[0].items() if places[1][pair] != name]
        assert len(moved) <= 2

    def test_small_class_is_in_every_split(self, tmp_path):
        fill_class(tmp_path, "a", 3)
        fill_class(tmp_path, "b", 40, value=100)
        data = load_data(f"folder:{tmp_path}")
        for name in SPLITS:
            labels = [label for _, label in grays(getattr(data, name))]
            assert labels.count(0) == 1

    def test_which_files_count(self, two_classes):
        save(solid(60), two_classes / "cat" / "deep" / "er" / "x.PNG")
        save(solid(61), two_classes / "cat" / "y.JpEg")
        save(solid(66), two_classes / "cat" / "scan.tiff")
        save(solid(62), two_classes / "cat" / ".hidden.png")
        save(solid(63), two_classes / "cat" / ".cache" / "z.png")
        save(solid(64), two_classes / ".git" / "z.png")
        save(solid(65), two_classes / "beside.png")
        for name in ("notes.txt", "LICENSE", "a.heic", "b.HEIC"):
            (two_classes / "cat" / name).write_text("not an image")
        with pytest.warns(UserWarning, match=r"left out: 2 of \.heic, 1 of \.txt, 1 of no suffix"):
            data = load_data(f"folder:{two_classes}")
        seen = [pair for name in SPLITS for pair in grays(getattr(data, name))]
        assert data.class_names == ("cat", "dog")
        assert sorted(gray for gray, label in seen if label == 0) == [*range(20), 60, 61, 66]

    def test_image_size_is_the_median_of_upright_training_images(self, tmp_path):
        for name in ("a", "b"):
            for index in range(10):
                save_oriented(tmp_path / "train" / name / f"{index}.jpg", 6)  # 48 high, 32 wide
            save(solid(0, (900, 700)), tmp_path / "train" / name / "large.png")
        assert load_data(f"folder:{tmp_path}").image_size == (48, 32)

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
    def test_jpeg_pixels_are_those_of_read_image(self, tmp_path, mode, options):
        rng = np.random.default_rng(0)
        for name in ("a", "b"):
            for index in range(3):
                noise = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
                image = noise.resize((61, 43), Image.Resampling.BICUBIC).convert(mode)
                save(image, tmp_path / name / f"{index}.jpg", **options)
        files = [tmp_path / name / f"{index}.jpg" for name in ("a", "b") for index in range(3)]
        expected = {(read_image(file).tobytes(), file.parent.name) for file in files}
        data = load_data(f"folder:{tmp_path}")
        found = {
            (image.numpy().tobytes(), data.class_names[label])
            for name in SPLITS
            for image, label in getattr(data, name).dataset
        }
        assert all(check_image(file).plain_jpeg for file in files)
        assert found == expected

    @pytest.mark.parametrize("suffix", [".jpg", ".png"])
    def test_window_reads_a_part_of_an_upright_image(self, tmp_path, suffix):
        for name in ("a", "b"):
            for index in range(3):
                save_oriented(tmp_path / name / f"{index}{suffix}", 6 if name == "a" else 1)
        split = load_data(f"folder:{tmp_path}").train

        def window(height, width):
            return height // 4, width // 8, height // 2, width // 3

        sizes = set()
        for index in range(split.count):
            (whole, label), (part, same_label) = (
                load_one(split, index),
                load_one(split, index, window),
            )
            (h, w, _), label = whole.shape, int(label)
            sizes.add((h, w, label))
            expected = whole.numpy()[h // 4 : h // 4 + h // 2, w // 8 : w // 8 + w // 3]
            np.testing.assert_array_equal(part, expected)
            assert same_label == label
        assert sizes == {(48, 32, 0), (32, 48, 1)}

    def test_progress_is_drawn_for_a_terminal_only(self, two_classes, monkeypatch, capsys):
        monkeypatch.setattr(progress_module, "_PROGRESS_FROM", 10)
        load_data(f"folder:{two_classes}")
        assert capsys.readouterr() == ("", "")
        monkeypatch.setenv("FORCE_COLOR", "1")
        load_data(f"folder:{two_classes}")
        streams = capsys.readouterr()
        assert streams.out == ""
        assert "Checking images" in streams.err


class TestFolderWithSplits:
    @pytest.mark.parametrize(
        "names",
        [
            ("train", "val", "test"),
            ("Training", "valid", "Testing"),
            ("train", "validation", "test"),
            ("train", "Val", "test"),
        ],
    )
    def test_all_given(self, tmp_path, names):
        for split, value in zip(names, (0, 50, 100), strict=True):
            fill_class(tmp_path / split, "a", 2, value)
            fill_class(tmp_path / split, "b", 1, value + 20)
        data = load_data(f"folder:{tmp_path}")
        assert sorted(grays(data.train)) == [(0, 0), (1, 0), (20, 1)]
        assert sorted(grays(data.validation)) == [(50, 0), (51, 0), (70, 1)]
        assert sorted(grays(data.test)) == [(100, 0), (101, 0), (120, 1)]

    def test_validation_missing(self, tmp_path):
        fill_class(tmp_path / "train", "a", 20)
        fill_class(tmp_path / "train", "b", 10, 50)
        fill_class(tmp_path / "test", "a", 1, 100)
        fill_class(tmp_path / "test", "b", 1, 120)
        data = load_data(f"folder:{tmp_path}")
        assert sorted(grays(data.test)) == [(100, 0), (120, 1)]
        assert Counter(label for _, label in grays(data.validation)) == {0: 2, 1: 1}
        assert sorted(grays(data.train) + grays(data.validation)) == [
            *((gray, 0) for gray in range(20)),
            *((gray, 1) for gray in range(50, 60)),
        ]

    def test_test_missing_takes_val_and_carves_validation_from_train(self, tmp_path):
        fill_class(tmp_path / "train", "a", 20)
        fill_class(tmp_path / "train", "b", 10, 50)
        fill_class(tmp_path / "val", "a", 1, 100)
        fill_class(tmp_path / "val", "b", 1, 120)
        data = load_data(f"folder:{tmp_path}")
        assert sorted(grays(data.test)) == [(100, 0), (120, 1)]
        assert Counter(label for _, label in grays(data.validation)) == {0: 2, 1: 1}
        assert data.train.count == 27

    def test_train_alone_is_split_80_10_10(self, tmp_path):
        fill_class(tmp_path / "train", "a", 10)
        fill_class(tmp_path / "train", "b", 20, 50)
        data = load_data(f"folder:{tmp_path}")
        assert [getattr(data, name).count for name in SPLITS] == [24, 3, 3]

    def test_train_may_be_a_class(self, tmp_path):
        fill_class(tmp_path, "train", 3)
        fill_class(tmp_path, "plane", 3, 50)
        data = load_data(f"folder:{tmp_path}")
        assert data.class_names == ("plane", "train")


class TestFolderErrors:
    def check(self, path, match, **options):
        with pytest.raises(ValueError, match=match):
            load_data(f"folder:{path}", **options)

    def test_missing(self, tmp_path):
        self.check(tmp_path / "none", r"does not exist\. Received: path='.*none'")

    def test_file(self, tmp_path):
        self.check(save(solid(0), tmp_path / "a.png"), r"is a file\. Received: path='.*a\.png'")

    def test_no_class_folders(self, tmp_path):
        save(solid(0), tmp_path / "a.png")
        self.check(tmp_path, "a folder of images for each class.*without any folder")

    def test_one_class(self, tmp_path):
        fill_class(tmp_path, "cat", 3)
        self.check(tmp_path, r"at least two classes\. Received: .* the classes \['cat'\]")

    def test_class_name_that_is_no_text(self, two_classes):
        """As an old zip file leaves it: run.json could not hold it."""
        os.rename(two_classes / "cat", os.fsencode(two_classes) + b"/caf\xe9")
        self.check(two_classes, r"must be UTF-8: rename them.*\[b'caf\\xe9'\]")

    def test_empty_class(self, two_classes):
        (two_classes / "eel").mkdir()
        (two_classes / "eel" / "notes.txt").touch()
        self.check(two_classes, r"with the empty classes \['eel'\]")

    def test_small_class(self, two_classes):
        fill_class(two_classes, "ant", 2)
        self.check(two_classes, r"at least 3 images.*class 'ant' with 2")

    def test_small_class_beside_a_test_split(self, tmp_path):
        for split in ("train", "test"):
            fill_class(tmp_path / split, "ant", 1)
            fill_class(tmp_path / split, "bee", 5)
        self.check(tmp_path, r"at least 2 images.*class 'ant' with 1")

    def test_classes_differ(self, tmp_path):
        for split, names in (("train", "abc"), ("test", "abd")):
            for name in names:
                fill_class(tmp_path / split, name, 2)
        self.check(tmp_path, r"with 'test', missing \['c'\], extra \['d'\]")

    def test_no_train(self, tmp_path):
        for split in ("val", "test"):
            fill_class(tmp_path / split, "a", 2)
        self.check(tmp_path, r"must hold 'train'\. Received: .* with \['test', 'val'\]")

    def test_split_twice(self, tmp_path):
        for split in ("train", "val", "valid"):
            fill_class(tmp_path / split, "a", 2)
        self.check(tmp_path, r"each split once\. .* with \['train', 'val', 'valid'\]")

    def test_splits_of_other_names(self, tmp_path):
        for split in ("training_set", "test_set"):
            for name in ("cat", "dog"):
                fill_class(tmp_path / split, name, 3)
        self.check(tmp_path, r"look like splits.*'val' and 'test'\..*\['test_set', 'training_")
        fill_class(tmp_path / "test_set", "eel", 3)  # other folders inside: these are classes
        assert load_data(f"folder:{tmp_path}").class_names == ("test_set", "training_set")

    def test_classes_with_the_same_folders_inside(self, tmp_path):
        for name in ("cat", "dog"):
            for year in ("2019", "2020"):
                fill_class(tmp_path / name, year, 3)
        assert load_data(f"folder:{tmp_path}").class_names == ("cat", "dog")

    def test_splits_beside_classes(self, tmp_path):
        fill_class(tmp_path / "train", "a", 2)
        fill_class(tmp_path, "cat", 2)
        self.check(tmp_path, r"split folders \['train'\] and, beside them,.*\['cat'\]")

    def test_many_unreadable(self, two_classes):
        for index in range(5):
            (two_classes / "dog" / f"bad{index}.jpg").write_text("text")
        self.check(
            two_classes,
            r"^5 of 55 images cannot be read.*skip_unreadable=True \(`--skip-unreadable` on the"
            r" command line\).*bad0\.jpg.*bad1\.jpg.*bad2\.jpg.*And 2 more\.$",
        )

    def test_class_of_unreadable_files(self, two_classes):
        (two_classes / "eel").mkdir()
        (two_classes / "eel" / "a.jpg").write_text("text")
        self.check(two_classes, r"classes \['eel'\] of 'train' with unread", skip_unreadable=True)


def test_folder_of_difficult_files(tmp_path):
    """A damaged file and a text file among every unusual kind of image."""
    for name in ("a", "b"):
        fill_class(tmp_path / "train", name, 2)
    folder = tmp_path / "test" / "a"
    save(np.full((4, 6), 25700, np.uint16), folder / "wide.png")
    save_palette_with_alpha(folder / "palette.png")
    save(Image.new("CMYK", (16, 8), (255, 0, 255, 0)), folder / "cmyk.jpg", quality=95)
    save_oriented(folder / "turned.jpg", 6)
    fill_class(tmp_path / "test", "b", 1)
    whole = save(
        np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), folder / "x.jpg"
    )
    whole.write_bytes(whole.read_bytes()[:900])
    (folder / "y.jpg").write_text("This is text.")

    with pytest.raises(ValueError, match=r"2 of 11 images cannot be read.*x\.jpg': .*y\.jpg': "):
        load_data(f"folder:{tmp_path}")
    data = load_data(f"folder:{tmp_path}", skip_unreadable=True)

    assert list(data.skipped) == [str(folder / "x.jpg"), str(folder / "y.jpg")]
    for path, error in data.skipped.items():
        assert error.startswith(f"Cannot read image {path!r}: ")
    assert data.test.count == 5
    images = {tuple(i.shape): i.numpy() for i, y in data.test.dataset if y == 0}
    assert (images[4, 6, 3] == 100).all()
    assert images[1, 3, 3].tolist() == [[[*RED], [204, 204, 255], [*WHITE]]]
    assert np.abs(images[8, 16, 3].astype(int) - GREEN).max() <= 3
    assert np.abs(images[48, 32, 3][0, -1].astype(int) - RED).max() <= 3
    assert np.abs(images[48, 32, 3][-1, 0].astype(int) - WHITE).max() <= 3


def example(index, label):
    """An image that tells its index in the first pixel."""
    return {"image": np.full((6, 7, 3), index, np.uint8), "label": label}


class TinyBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders below share: no download, three classes."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = Path(__file__).parent  # TFDS would look for the package of this module
    IMAGE = tfds.features.Image(shape=(6, 7, 3))
    COUNTS = ()

    def _info(self):
        features = {
            "image": self.IMAGE,
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in self.COUNTS}

    def _generate_examples(self, count):
        for index in range(count):
            yield index, example(index, index % 3)


class TinyComplete(TinyBuilder):
    COUNTS = (("train", 30), ("validation", 4), ("test", 5))
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="one", description="The first."),
        tfds.core.BuilderConfig(name="two", description="The second."),
    )


class TinyTrain(TinyBuilder):
    COUNTS = (("train", 30),)


class TinyTrainTest(TinyBuilder):
    COUNTS = (("train", 30), ("test", 5))


class TinyTrainVal(TinyBuilder):
    COUNTS = (("train", 30), ("validation", 4))


class TinyUnlabelled(TinyBuilder):
    COUNTS = (("train", 30), ("validation", 4), ("test", 5))

    def _generate_examples(self, count):
        for index in range(count):
            yield index, example(index, -1 if count == 5 else index % 3)


class TinyTestOnly(TinyBuilder):
    COUNTS = (("test", 5),)


class TinyTwoImages(TinyBuilder):
    COUNTS = (("train", 2),)


class TinySizes(TinyBuilder):
    """Images of 4 to 33 rows, without a declared size."""

    IMAGE = tfds.features.Image()
    COUNTS = (("train", 30), ("validation", 1), ("test", 1))

    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"image": np.zeros((4 + index, 9, 3), np.uint8), "label": 0}


class TinyGray(TinyBuilder):
    IMAGE = tfds.features.Image(shape=(2, 1, 1))
    COUNTS = (("train", 1), ("validation", 1), ("test", 1))
    PIXELS = np.array([[[7]], [[200]]], np.uint8)

    def _generate_examples(self, count):
        yield 0, {"image": self.PIXELS, "label": 1}


class TinyAlpha(TinyGray):
    IMAGE = tfds.features.Image(shape=(2, 1, 4), encoding_format="png")
    PIXELS = np.array([[[0, 100, 200, 102]], [[9, 8, 7, 255]]], np.uint8)


class TinyWide(TinyGray):
    IMAGE = tfds.features.Image(shape=(2, 1, 1), dtype=np.uint16, encoding_format="png")
    PIXELS = np.array([[[65535]], [[129]]], np.uint16)


class TinyJpeg(TinyBuilder):
    """Photographs-to-be: smooth noise of 45 x 61 pixels, as JPEG, in two files."""

    IMAGE = tfds.features.Image(encoding_format="jpeg")
    COUNTS = (("train", 3), ("validation", 1), ("test", 1))

    def _generate_examples(self, count):
        for index in range(count):
            noise = np.random.default_rng(index).integers(0, 256, (9, 7, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((61, 45), Image.Resampling.BICUBIC)
            yield index, {"image": np.asarray(image), "label": index % 3}


class TinyJpegGray(TinyJpeg):
    IMAGE = tfds.features.Image(shape=(45, 61, 1), encoding_format="jpeg")

    def _generate_examples(self, count):
        for index, example in super()._generate_examples(count):
            yield index, {**example, "image": example["image"][..., :1]}


class TinyFloat(TinyGray):
    IMAGE = tfds.features.Image(shape=(2, 1, 1), dtype=np.float32)
    PIXELS = np.zeros((2, 1, 1), np.float32)


class TinyTexts(TinyBuilder):
    COUNTS = (("train", 3),)

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["a"])}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"text": "a", "label": 0}


class TinyOffline(TinyBuilder):
    def _split_generators(self, dl_manager):
        raise ConnectionError("Name or service not known")


class TestTFDS:
    @pytest.fixture(autouse=True)
    def data_dir(self, tmp_path_factory, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))

    def indices(self, split):
        return [int(image[0, 0, 0]) for image, _ in split.dataset]

    def test_own_splits(self):
        data = load_data("tfds:tiny_complete:two")
        assert data.name == "tfds:tiny_complete:two"
        assert data.class_names == ("ant", "bee", "cow")
        assert data.image_size == (6, 7)
        spec = (tf.TensorSpec((6, 7, 3), tf.uint8), tf.TensorSpec((), tf.int32))
        for name, count in (("train", 30), ("validation", 4), ("test", 5)):
            split = getattr(data, name)
            assert split.count == count
            assert split.dataset.element_spec == spec
            assert sorted(self.indices(split)) == list(range(count))
            assert all(label == index % 3 for index, label in grays(split))
            assert self.indices(split) == self.indices(split)

    def test_fingerprint_names_the_config(self):
        one, two, again = (load_data(f"tfds:tiny_complete:{c}") for c in ("one", "two", "one"))
        assert one.fingerprint == again.fingerprint != two.fingerprint

    def test_train_alone(self):
        data = load_data("tfds:tiny_train")
        parts = [self.indices(getattr(data, name)) for name in SPLITS]
        assert [len(part) for part in parts] == [24, 3, 3]
        assert [getattr(data, name).count for name in SPLITS] == [24, 3, 3]
        assert sorted(index for part in parts for index in part) == list(range(30))

    def test_validation_missing(self):
        data = load_data("tfds:tiny_train_test")
        assert [getattr(data, name).count for name in SPLITS] == [27, 3, 5]
        train = self.indices(data.train) + self.indices(data.validation)
        assert sorted(train) == list(range(30))
        assert sorted(self.indices(data.test)) == list(range(5))

    @pytest.mark.parametrize("name", ["tiny_train_val", "tiny_unlabelled"])
    def test_test_missing_or_without_labels(self, name):
        data = load_data(f"tfds:{name}")
        assert [getattr(data, split).count for split in SPLITS] == [27, 3, 4]
        train = self.indices(data.train) + self.indices(data.validation)
        assert sorted(train) == list(range(30))
        assert sorted(self.indices(data.test)) == list(range(4))

    def test_median_size(self):
        data = load_data("tfds:tiny_sizes")
        assert data.image_size == (18, 9)  # of 4 to 33
        spec = (tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int32))
        assert data.train.dataset.element_spec == spec

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("tiny_gray", [[7, 7, 7], [200, 200, 200]]),
            ("tiny_alpha", [[153, 193, 233], [9, 8, 7]]),
            ("tiny_wide", [[255, 255, 255], [1, 1, 1]]),
        ],
    )
    def test_becomes_rgb(self, name, expected):
        image, label = next(iter(load_data(f"tfds:{name}").train.dataset))
        assert image.numpy()[:, 0].tolist() == expected
        assert int(label) == 1

    @pytest.mark.parametrize("name", ["tiny_jpeg", "tiny_jpeg_gray", "tiny_gray", "tiny_wide"])
    def test_window_reads_a_part(self, name):
        split = load_data(f"tfds:{name}").train
        for index in range(split.count):
            whole, label = load_one(split, index)
            h, w, _ = whole.shape
            window = (h // 3, w // 5, h - h // 2, w - w // 4)
            part, same_label = load_one(split, index, lambda *_, window=window: window)
            y, x, height, width = window
            np.testing.assert_array_equal(part, whole[y : y + height, x : x + width])
            assert same_label == label

    def test_jpeg_pixels_are_those_of_pillow(self):
        data = load_data("tfds:tiny_jpeg")
        builder = tfds.builder("tiny_jpeg", data_dir=os.environ["TFDS_DATA_DIR"])
        raw = builder.as_dataset("train", decoders={"image": tfds.decode.SkipDecoding()})
        expected = [decode_image(example["image"].numpy(), "a") for example in raw]
        for (image, _), pixels in zip(data.train.dataset, expected, strict=True):
            np.testing.assert_array_equal(image, pixels)

    def test_files_are_read_one_after_the_other(self, monkeypatch):
        """In the order of TFDS, and each slice of a split begins where the one before ends."""
        builder = tfds.builder("tiny_train", data_dir=os.environ["TFDS_DATA_DIR"])
        config = tfds.download.DownloadConfig(num_shards=4)
        builder.download_and_prepare(download_config=config)
        assert len(builder.info.splits["train"].filepaths) == 4
        order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        stored = [int(e["image"][0, 0, 0]) for e in builder.as_dataset("train", read_config=order)]
        data = load_data("tfds:tiny_train")
        parts = [self.indices(getattr(data, s)) for s in ("train", "validation", "test")]
        assert [index for part in parts for index in part] == stored
        monkeypatch.setattr(tfds_module, "scan_records", lambda paths: scan_records(paths[:3]))
        with pytest.raises(ValueError, match=r"of tfds:tiny_train must have \d records.* 0\.$"):
            load_data("tfds:tiny_train")

    def test_other_formats(self, monkeypatch):
        prepare = tfds_module._prepare_builder

        def with_format(name):
            builder = prepare(name)
            monkeypatch.setattr(
                type(builder.info), "file_format", tfds.core.FileFormat.ARRAY_RECORD
            )
            return builder

        monkeypatch.setattr(tfds_module, "_prepare_builder", with_format)
        with pytest.raises(ValueError, match=r"as TFRecord files.*tiny_train .*'array_record'"):
            load_data("tfds:tiny_train")

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("no_such_set", r"tfds:no_such_set, with DatasetNotFoundError"),
            ("tiny_complete:three", r"tfds:tiny_complete:three, with ValueError"),
            ("tiny_offline", r"tfds:tiny_offline, with ConnectionError: Name or service not"),
            ("tiny_texts", r"features `image`.*`label`.*tfds:tiny_texts with (?s:.*)'text': Text"),
            ("tiny_float", r"uint8 or uint16.*tfds:tiny_float with (?s:.*)float32"),
            ("tiny_test_only", r"a `train` split\. .*tfds:tiny_test_only .* \['test'\]"),
            ("tiny_two_images", r"too small.*tfds:tiny_two_images with 2 images"),
        ],
    )
    def test_errors(self, name, match):
        with pytest.raises(ValueError, match=match):
            load_data(f"tfds:{name}")

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        match = r'tfds:mnist.*pip install tensorflow-datasets importlib_resources, or "\.\[tfds\]"'
        with pytest.raises(ValueError, match=match):
            load_data("tfds:mnist")


def test_images_right_inside_split_folders_are_an_error(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for index in range(4):
            Image.new("RGB", (4, 4)).save(tmp_path / split / f"{index}.png")
    with pytest.raises(ValueError, match=r"one folder for each class.*\['test', 'train'\]"):
        load_data(f"folder:{tmp_path}")
