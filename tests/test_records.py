"""TFRecord files: reading at random, the images of a folder of them, and every damage."""

import io
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_vit.data import load_data
from keras_vit.data.records import scan_records

SPLITS = ("train", "validation", "test")


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


class TestRecords:
    def test_every_record_of_every_file(self, tmp_path, monkeypatch):
        """Of any length, an empty file among them, in any order; Windows has no `os.pread`."""
        monkeypatch.delattr(os, "pread", raising=False)
        rng = np.random.default_rng(0)
        data = [[rng.bytes(size) for size in sizes] for sizes in ([7, 0, 300], [], [70_000, 1])]
        paths = [str(write(tmp_path / f"{i}", records)) for i, records in enumerate(data)]
        records = scan_records(paths)
        flat = [record for file in data for record in file]
        assert [records.read(index) for index in (4, 0, 2, 3, 1)] == [
            flat[index] for index in (4, 0, 2, 3, 1)
        ]
        np.testing.assert_array_equal(records.files, [0, 0, 0, 2, 2])
        assert records.take([3, 1]).read(0) == flat[3]
        assert records.take(slice(2, 4)).read(1) == flat[3]
        read = tf.data.Dataset.range(5).map(records.tensor, num_parallel_calls=3)
        assert list(read.as_numpy_iterator()) == flat
        assert read.element_spec == tf.TensorSpec((), tf.string)

    @pytest.mark.parametrize("cut", [5, 11, 15, 100, 119])
    def test_cut_off(self, tmp_path, cut):
        """The second of two records of 100 bytes (116 with header and checksum) is not whole."""
        path = write(tmp_path / "a.tfrecord", [b"x" * 100] * 2)
        path.write_bytes(path.read_bytes()[: 116 + cut - 4])
        with pytest.raises(ValueError, match=r"a\.tfrecord', damaged or cut off at offset 116 of"):
            scan_records([str(path)])

    @pytest.mark.parametrize("place", [0, 7, 8, 11])
    def test_damaged_header(self, tmp_path, place):
        path = write(tmp_path / "a.tfrecord", [b"x" * 100] * 3)
        data = bytearray(path.read_bytes())
        data[116 + place] ^= 4
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tfrecord', damaged or cut off at offset 116 of"):
            scan_records([str(path)])

    def test_compressed(self, tmp_path):
        path = tmp_path / "a.tfrecord.gz"
        with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
            writer.write(b"x" * 100)
        with pytest.raises(ValueError, match=r"uncompressed.*a\.tfrecord\.gz'.* offset 0 of"):
            scan_records([str(path)])

    def test_shorter_after_the_scan(self, tmp_path):
        path = write(tmp_path / "a.tfrecord", [b"x" * 100] * 2)
        records = scan_records([str(path)])
        path.write_bytes(path.read_bytes()[:150])
        assert records.read(0) == b"x" * 100
        with pytest.raises(ValueError, match=r"become shorter.*a\.tfrecord' at offset 116.*228"):
            records.read(1)


def encoded(value, format="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), (value, value, value)).save(buffer, format, **options)
    return buffer.getvalue()


def feature(value):
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def example(image, label, *, image_key="image/encoded", label_key="image/class/label", **others):
    features = {image_key: image, label_key: label, **others}
    features = {name: feature(value) for name, value in features.items() if value is not None}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_split(root, name, labels, first=0, **options):
    """Images of gray `first`, `first + 1`, ... with these labels."""
    examples = [example(encoded(first + i), label, **options) for i, label in enumerate(labels)]
    return write(root / name, examples)


def grays(split):
    return [(int(image[0, 0, 0]), int(label)) for image, label in split.dataset]


def load(root):
    return load_data(f"tfrecord:{root}")


class TestFolderOfRecords:
    def test_own_splits(self, tmp_path):
        write_split(tmp_path, "train.tfrecord-00000-of-00002", [0, 1, 2])
        write_split(tmp_path, "train.tfrecord-00001-of-00002", [2, 0], 10)
        write_split(tmp_path, "validation.tfrecord", [1, 1], 20)
        write_split(tmp_path, "test.tfrecords", [2], 30)
        (tmp_path / "notes.txt").write_text("none")
        data = load(tmp_path)
        assert data.name == f"tfrecord:{tmp_path}"
        assert grays(data.train) == [(0, 0), (1, 1), (2, 2), (10, 2), (11, 0)]
        assert grays(data.validation) == [(20, 1), (21, 1)]
        assert grays(data.test) == [(30, 2)]
        assert [getattr(data, name).count for name in SPLITS] == [5, 2, 1]
        assert data.class_names == ("0", "1", "2")
        assert data.image_size == (3, 5)
        spec = (tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int32))
        assert data.train.dataset.element_spec == spec

    def test_names_of_the_inception_writer(self, tmp_path):
        """Labels from 1, names without a suffix, texts."""
        for name, labels in (("train-00000-of-00001", [2, 1, 2, 1]), ("test-00000-of-00001", [1])):
            texts = [f"class {label}".encode() for label in labels]
            records = [
                example(encoded(9), label, **{"image/class/text": text})
                for label, text in zip(labels, texts, strict=True)
            ]
            write(tmp_path / name, records)
        data = load(tmp_path)
        assert data.class_names == ("class 1", "class 2")
        assert [label for _, label in grays(data.test)] == [0]
        assert Counter(data.train) == {0: 1, 1: 1}
        assert Counter(data.validation) == {0: 1, 1: 1}

    def test_other_names_of_the_splits(self, tmp_path):
        write_split(tmp_path, "training-00000-of-00001", [0, 1, 2])
        write_split(tmp_path, "valid-00000-of-00001", [2, 1], 10)
        write_split(tmp_path, "testing-00000-of-00001", [1], 20)
        data = load(tmp_path)
        assert grays(data.train) == [(0, 0), (1, 1), (2, 2)]
        assert grays(data.validation) == [(10, 2), (11, 1)]
        assert grays(data.test) == [(20, 1)]

    def test_texts_that_two_classes_have_are_no_names(self, tmp_path):
        """ImageNet has two classes "crane"."""
        for name in SPLITS:
            records = [
                example(encoded(9), label, **{"image/class/text": text})
                for label, text in ((0, b"crane"), (1, b"ox"), (2, b"crane"))
            ]
            write(tmp_path / f"{name}.tfrecord", records)
        assert load(tmp_path).class_names == ("0", "1", "2")

    @pytest.mark.parametrize(
        ("labels", "lines", "expected"),
        [
            ([1, 2, 3], "a\nb\nc\n", [0, 1, 2]),  # 1 to K
            ([1, 2, 2], "a\nb\nc\n", [1, 2, 2]),  # 0 to K - 1, the first of which is absent
            ([0, 2, 1], "a\nb\nc", [0, 2, 1]),
            ([1, 2, 3], None, [0, 1, 2]),
        ],
    )
    def test_first_label(self, tmp_path, labels, lines, expected):
        for name in SPLITS:
            write_split(tmp_path, f"{name}.tfrecord", labels)
        if lines:
            (tmp_path / "labels.txt").write_text(lines)
        data = load(tmp_path)
        assert data.class_names == (("a", "b", "c") if lines else ("1", "2", "3"))
        assert [label for _, label in grays(data.train)] == expected

    def test_names_of_a_careless_editor(self, tmp_path):
        """A byte order mark, and empty lines at the end."""
        for name in SPLITS:
            write_split(tmp_path, f"{name}.tfrecord", [1, 2])
        (tmp_path / "labels.txt").write_text("a\nb\n\n", encoding="utf-8-sig")
        data = load(tmp_path)
        assert data.class_names == ("a", "b")
        assert [label for _, label in grays(data.train)] == [0, 1]

    @pytest.mark.parametrize("lines", ["a\n\nb\n", "a\nb\na\n"])
    def test_names_must_differ(self, tmp_path, lines):
        write_split(tmp_path, "train.tfrecord", [0, 1, 2])
        (tmp_path / "labels.txt").write_text(lines)
        with pytest.raises(ValueError, match=r"labels.txt must have another name in each line"):
            load(tmp_path)

    @pytest.mark.parametrize("keys", [("image", "label"), ("jpg", "label")])
    def test_other_keys(self, tmp_path, keys):
        for name in SPLITS:
            write_split(
                tmp_path, f"{name}.tfrecord", [0, 1], 7, image_key=keys[0], label_key=keys[1]
            )
        assert grays(load(tmp_path).test) == [(7, 0), (8, 1)]

    @pytest.mark.parametrize(
        "name",
        [
            "cifar10_{}.tfrecord",
            "a_{}_00000-of-00001.tfrecord",
            "1.{}.tfrecord",
            "a_train_b-{}.tfrecord-00000-of-00001",
        ],
    )
    def test_names_of_slim(self, tmp_path, name):
        for split, first in (("train", 0), ("validation", 20), ("test", 30)):
            write_split(tmp_path, name.format(split), [0, 1], first)
        data = load(tmp_path)
        assert [gray for gray, _ in grays(data.train)] == [0, 1]
        assert [gray for gray, _ in grays(data.validation)] == [20, 21]
        assert [gray for gray, _ in grays(data.test)] == [30, 31]

    @pytest.mark.parametrize("name", ["train.tfrecord", "00000.tfrecord"])
    def test_train_alone_is_split_by_class(self, tmp_path, name):
        """Sorted by class, as a careless writer leaves them."""
        write_split(tmp_path, name, [0] * 20 + [1] * 30 + [2] * 3)
        data = load(tmp_path)
        assert Counter(data.train) == {0: 16, 1: 24, 2: 1}
        assert Counter(data.validation) == {0: 2, 1: 3, 2: 1}
        assert Counter(data.test) == {0: 2, 1: 3, 2: 1}
        seen = sorted(pair for split in SPLITS for pair in grays(getattr(data, split)))
        assert [gray for gray, _ in seen] == list(range(53))

    def test_test_missing(self, tmp_path):
        write_split(tmp_path, "train.tfrecord", [0, 1] * 10)
        write_split(tmp_path, "val.tfrecord", [0, 1, 1], 100)
        data = load(tmp_path)
        assert grays(data.test) == [(100, 0), (101, 1), (102, 1)]
        assert Counter(data.validation) == {0: 1, 1: 1}
        assert Counter(data.train) == {0: 9, 1: 9}

    def test_jpeg_window_and_other_formats(self, tmp_path):
        """A JPEG is decoded in part, a PNG and a WebP whole; the pixels are the same."""
        noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((61, 45), Image.Resampling.BICUBIC)
        records, pixels = [], []
        for format, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
            buffer = io.BytesIO()
            image.save(buffer, format, **options)
            records.append(example(buffer.getvalue(), 0))
            pixels.append(np.asarray(Image.open(buffer).convert("RGB")))
        for name in SPLITS:
            write(tmp_path / f"{name}.tfrecord", records)
        split = load(tmp_path).train
        for index, expected in enumerate(pixels):
            read, number = tf.function(split.load), tf.constant(index, tf.int64)
            np.testing.assert_array_equal(read(number)[0], expected)
            part, _ = read(number, lambda height, width: (11, 3, height - 20, width - 30))
            np.testing.assert_array_equal(part, expected[11:36, 3:34])

    def test_fingerprint_is_of_the_files_not_of_the_place(self, tmp_path):
        prints = []
        for place, labels in (("a", [0, 1]), ("b", [0, 1]), ("c", [0, 1, 1]), ("d", [1, 0])):
            for name in SPLITS:
                write_split(tmp_path / place, f"{name}.tfrecord", labels)
            prints.append(load(tmp_path / place).fingerprint)
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3  # more records, and as many with other labels


def Counter(split):
    labels = [label for _, label in grays(split)]
    return {label: labels.count(label) for label in sorted(set(labels))}


class TestErrors:
    def check(self, root, match):
        with pytest.raises(ValueError, match=match):
            load(root)

    def test_missing(self, tmp_path):
        self.check(tmp_path / "none", r"must exist\. Received: path='.*none'")

    def test_no_files(self, tmp_path):
        (tmp_path / "a.txt").touch()
        self.check(tmp_path, r"named train\*\.tfrecord\*\. Received: .* with \[\]")

    def test_empty_split(self, tmp_path):
        write_split(tmp_path, "train.tfrecord", [0, 1])
        write_split(tmp_path, "test.tfrecord", [])
        self.check(tmp_path, r"must hold records\. Received: .* with none in \['test'\]")

    def test_no_train(self, tmp_path):
        write_split(tmp_path, "test.tfrecord", [0])
        self.check(tmp_path, r"for training.* with \['test\.tfrecord'\]")

    def test_splits_beside_others(self, tmp_path):
        for name in ("train.tfrecord", "trainer.tfrecord"):
            write_split(tmp_path, name, [0])
        self.check(tmp_path, r"begin with a split.* with \['trainer\.tfrecord'\] beside")

    def test_splits_as_tfds_names_them(self, tmp_path):
        write_split(tmp_path, "my-flowers-train.tfrecord-00000-of-00001", [0, 1, 0, 1])
        write_split(tmp_path, "my-flowers-test.tfrecord-00000-of-00001", [1, 0], 10)
        assert grays(load(tmp_path).test) == [(10, 1), (11, 0)]

    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    def test_image_that_cannot_be_read(self, tmp_path, format):
        first = example(encoded(3, format), 0)
        whole = encoded(3, format)
        write(tmp_path / "train.tfrecord", [first, example(whole[: len(whole) // 2], 1)])
        self.check(tmp_path, rf"train\.tfrecord' at offset {len(first) + 16}")

    def test_nothing_is_skipped(self, tmp_path):
        with pytest.raises(ValueError, match=r"is for folders.*spec='tfrecord:"):
            load_data(f"tfrecord:{tmp_path}", skip_unreadable=True)

    @pytest.mark.parametrize("key", ["image", "label"])
    def test_no_key(self, tmp_path, key):
        write_split(tmp_path, "train.tfrecord", [0] * 5, **{f"{key}_key": "other"})
        self.check(
            tmp_path, rf"one of the features .*{key}.*train\.tfrecord' at offset 0 with .*oth"
        )

    def test_record_without_a_label(self, tmp_path):
        first = example(encoded(3), 0)
        write(tmp_path / "train.tfrecord", [first, example(encoded(3), None)])
        self.check(tmp_path, rf"`image/class/label`.*at offset {len(first) + 16} with \['image/enc")

    def test_damaged_record(self, tmp_path):
        first = example(encoded(3), 0)
        write(tmp_path / "train.tfrecord", [first, b"\xff\xff not an Example"])
        self.check(tmp_path, rf"a `tf\.train\.Example`.*at offset {len(first) + 16}")

    @pytest.mark.parametrize("labels", [[-1, 0], [0, 3], [1, 4]])
    def test_labels_out_of_range(self, tmp_path, labels):
        write_split(tmp_path, "train.tfrecord", labels)
        (tmp_path / "labels.txt").write_text("a\nb\nc\n")
        low, high = labels
        self.check(tmp_path, rf"labels from {low} to {high} and 3 lines\.")

    def test_small_class(self, tmp_path):
        write_split(tmp_path, "train.tfrecord", [0] * 5 + [1] * 2)
        self.check(tmp_path, r"at least 3 images in 'train'.* with 2 of label 1")
