"""Checkpoints come from strangers: what is wrong with a file is a ValueError that names it.

Every refusal here is of `from_checkpoint` and of `load_weights`, whose model stays as it was, bit
for bit. safetensors has no checksums: of a file of the right size, what its header says is checked,
and that the numbers are finite.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import tracemalloc
import types
import warnings
import zipfile

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import randomise

import keras_vit
from keras_vit.weights import checkpoint as checkpoint_module

ARGUMENTS = {
    "variant": keras_vit.ViTConfig(hidden_dim=12, depth=2, num_heads=2, mlp_dim=20, patch_size=4),
    "image_size": 8,
    "num_classes": 5,
    "gelu": "tanh",
    "normalization": "minus_one_one",
}
DATA = pathlib.Path(__file__).parent.parent / "data" / "checkpoints"
FILES = {"google": "weights.npz", "timm": "weights.safetensors"}
both_families = pytest.mark.parametrize("family", FILES)


@functools.cache
def original():
    """The model whose weights are in the files."""
    return randomise(keras_vit.build_vit(**ARGUMENTS), seed=5)


@functools.cache
def target():
    """The model that no refused file changes."""
    return randomise(keras_vit.build_vit(**ARGUMENTS), seed=7)


def values(model):
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights]


def assert_same_values(model, expected):
    for found, value in zip(values(model), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def assert_refused(path, match, blamed=None):
    """Both ways of loading name the file, or the one beside it that is to blame, and the reason."""
    before = values(target())
    for load in (keras_vit.from_checkpoint, functools.partial(keras_vit.load_weights, target())):
        with pytest.raises(ValueError, match=match) as caught:
            load(path)
        assert str(blamed or path) in str(caught.value)
    assert_same_values(target(), before)


def assert_loads(path, expected):
    """Both ways of loading give these weights."""
    assert_same_values(keras_vit.from_checkpoint(path), expected)
    model = randomise(keras_vit.build_vit(**ARGUMENTS), seed=11)
    keras_vit.load_weights(model, path)
    assert_same_values(model, expected)


@contextlib.contextmanager
def peak_below(megabytes):
    """No more memory than this is taken for arrays and Python's objects."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


# Writing files, good and bad.


def save(folder, family="google"):
    """The file of a family as `save_checkpoint` writes it."""
    path = folder / FILES[family]
    keras_vit.save_checkpoint(original(), path, family)
    return path


@functools.cache
def metadata(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


def read(path):
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    return safetensors.numpy.load_file(path)


def write(path, arrays, facts=None):
    """Writes tensors over those of a file, and keeps its metadata."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    facts = metadata(path) if facts is None else facts
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, path, facts)
    return path


def npy(array):
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=True)
    return file.getvalue()


def npy_that_says(header, data=b""):
    """The bytes of an .npy file with any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def npy_of_shape(shape, data=b"", descr="'<f4'"):
    return npy_that_says(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", data)


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    """A zip file of `(name, bytes)`."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members:
            archive.writestr(name, data)
    return path


def with_member(path, name, data, compression=zipfile.ZIP_STORED):
    """A good .npz file in which one member is added or replaced."""
    members = {f"{key}.npy": npy(array) for key, array in read(path).items()}
    return write_zip(path, {**members, name: data}.items(), compression)


def with_directory_field(path, offset, form, value):
    """A zip file in which a field of the first record of its directory has another value."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(b"PK\x01\x02") + offset, value)
    path.write_bytes(data)
    return path


def with_header(path, edit):
    """A safetensors file whose header, a dict or bytes, is replaced by what `edit` makes of it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header = edit(header) or header
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    return path


# What is no checkpoint at all.


def test_no_such_file(tmp_path):
    assert_refused(tmp_path / "weights.npz", "no such")


@pytest.mark.parametrize("name", ["weights.npz", "weights.safetensors", "weights"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty"),
        (bytes(5000), "neither .npz nor .safetensors"),
        (np.random.default_rng(3).bytes(5000), "neither .npz nor .safetensors"),
        (b"<html>404 Not Found</html>\n", "neither .npz nor .safetensors"),
        (npy(np.ones((3, 5))), "neither .npz nor .safetensors"),
        (b"PK\x05\x06" + bytes(18), "holds no tensors"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(500), "HDF5: use the `load_weights` of a Keras model"),
    ],
    ids=["empty", "zeros", "noise", "text", "npy", "empty-zip", "empty-safetensors", "hdf5"],
)
def test_not_a_checkpoint(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(path, match)


def test_keras_files(tmp_path):
    original().save(tmp_path / "model.keras")
    assert_refused(tmp_path / "model.keras", "Keras model: use keras.saving.load_model")
    original().save_weights(tmp_path / "model.weights.h5")
    assert_refused(tmp_path / "model.weights.h5", "use the `load_weights` of a Keras model")


def test_tensors_of_something_else(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"conv1/kernel": np.ones((3, 5))})
    assert_refused(path, "no known family.*conv1/kernel")


# Damage.


@pytest.mark.parametrize("keep", [0.005, 0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["stored", "compressed", "safetensors"])
def test_truncated(tmp_path, kind, keep):
    """From within the header to all but the last byte."""
    path = save(tmp_path, "timm" if kind == "safetensors" else "google")
    if kind == "compressed":
        np.savez_compressed(path, **read(path))
    data = path.read_bytes()
    path.write_bytes(data[: min(int(keep * len(data)), len(data) - 1)])
    assert_refused(path, "the file is damaged or cannot be read")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("write_archive", [np.savez, np.savez_compressed])
def test_a_changed_byte_in_an_npz(tmp_path, write_archive, place):
    path = save(tmp_path)
    write_archive(path, **read(path))
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel.npy")
    data = bytearray(path.read_bytes())
    start = member.header_offset + 30 + len(member.filename) + 128
    data[start + int(place * (member.compress_size - 148))] ^= 4
    path.write_bytes(data)
    assert_refused(path, r"(?i)damaged.*(Bad CRC-32|decompressing).*")


def edited(name, **fields):
    """Changes what a safetensors header says of a tensor."""
    return lambda header: header[name].update(fields)


@pytest.mark.parametrize(
    "edit",
    [
        edited("norm.weight", data_offsets=[0, 48]),
        edited("norm.weight", data_offsets=[48, 0]),
        edited("norm.weight", data_offsets=[10**12, 10**12 + 48]),
        edited("norm.weight", data_offsets=[-48, 0]),
        edited("norm.weight", shape=[13]),
        edited("norm.weight", shape=[10**6, 10**6]),
        edited("norm.weight", shape=[2**62, 2**62]),
        edited("norm.weight", shape=[-12]),
        edited("norm.weight", shape="12"),
        edited("norm.weight", dtype="F64"),
        edited("norm.weight", dtype="PICKLE"),
        lambda header: header.pop("norm.weight") and None,
        lambda header: b"[]",
        lambda header: b'{"norm.weight": ',
        lambda header: b"{" * 100_000,
        lambda header: {**header, "__metadata__": {"keras_vit": "{"}},
        lambda header: {**header, "__metadata__": 3},
    ],
)
def test_safetensors_header_that_lies(tmp_path, edit):
    path = with_header(save(tmp_path, "timm"), edit)
    assert_refused(path, "damaged")


@pytest.mark.parametrize("length", [9_000, 10**6, 10**9, 2**63, 2**64 - 1])
def test_safetensors_header_of_a_wrong_length(tmp_path, length):
    path = save(tmp_path, "timm")
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with peak_below(20):
        assert_refused(path, "the file is damaged")


# Tensors that make no model.

# What the families call the same: a norm of the last block, a kernel, the kernel of the patches,
# the bias of the head.
NAMES = {
    "google": types.SimpleNamespace(
        norm="Transformer/encoderblock_1/LayerNorm_1/scale",
        kernel="Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel",
        first_kernel="Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel",
        patches="embedding/kernel",
        head="head/bias",
        head_kernel="head/kernel",
        first="Transformer/encoder_norm/bias",
        last="head/kernel",
        block="encoderblock_{}/",
        respelled=("LayerNorm_1/", "LayerNorm_2/"),
    ),
    "timm": types.SimpleNamespace(
        norm="blocks.1.norm2.weight",
        kernel="blocks.1.mlp.fc1.weight",
        first_kernel="blocks.0.mlp.fc1.weight",
        patches="patch_embed.proj.weight",
        head="head.bias",
        head_kernel="head.weight",
        first="blocks.0.attn.proj.bias",
        last="pos_embed",
        block="blocks.{}.",
        respelled=("ls1.gamma", "gamma_1"),
    ),
}


def replaced(which, change):
    """Changes the tensor that `NAMES` calls `which`."""

    def edit(arrays, names):
        name = getattr(names, which)
        return {**arrays, name: change(arrays[name])}

    return edit


def renamed(which, name):
    """Gives it the name that `name` makes of its own."""

    def edit(arrays, names):
        old = getattr(names, which)
        return {name(key, names) if key == old else key: array for key, array in arrays.items()}

    return edit


def blocks_renumbered(old, new):
    def edit(arrays, names):
        old_block, new_block = names.block.format(old), names.block.format(new)
        return {key.replace(old_block, new_block): array for key, array in arrays.items()}

    return edit


EDITS = {
    "missing": (
        lambda arrays, names: {key: a for key, a in arrays.items() if key != names.norm},
        r"missing \(1\): {norm}",
    ),
    "renamed": (
        renamed("norm", lambda name, names: name + "x"),
        r"(?s)missing \(1\): {norm}\n.*unexpected \(1\): {norm}x",
    ),
    "extra": (
        lambda arrays, names: {**arrays, "text/kernel": np.ones((2, 3), "float32")},
        r"unexpected \(1\): text/kernel",
    ),
    "transposed": (replaced("kernel", np.transpose), r"mis-shaped \(1\): {kernel} \("),
    "wider": (
        replaced("kernel", lambda a: np.concatenate([a, a], axis=-1)),
        r"mis-shaped \(1\): {kernel} \(.*\), expected \(",
    ),
    "rank": (replaced("norm", lambda a: a[None]), r"mis-shaped \(1\): {norm} \(1, 12\), expected"),
    "scalar": (replaced("norm", lambda a: a[0]), r"mis-shaped \(1\): {norm} \(\), expected"),
    "no-rows": (replaced("norm", lambda a: a[:0]), r"mis-shaped \(1\): {norm} \(0,\), expected"),
    "patches-rank": (
        replaced("patches", np.ravel),
        r"{patches} (must have 4 axes|\(576,\), expected \()",
    ),
    "patches-no-rows": (
        replaced("patches", lambda a: a[:0]),
        r"{patches} (must have 4 axes, none|\(0, .*expected \()",
    ),
    "mlp-no-rows": (
        replaced("first_kernel", lambda a: a[:0]),
        r"{first_kernel} (must have 2 axes|\(0, .*expected \()",
    ),
    "head-scalar": (replaced("head", lambda a: a[0]), r"{head} must have 1 axes.*shape \(\)"),
    "head-kernel": (
        replaced("head_kernel", lambda a: a[:3]),
        r"mis-shaped \(1\): {head_kernel} \(",
    ),
    "gap": (blocks_renumbered(1, 2), r"unexpected \(1\d\): .*2"),
    "no-first-block": (blocks_renumbered(0, 5), "missing|no known family"),
    "huge-number": (blocks_renumbered(1, 10**30), r"unexpected \(1\d\): .*10{29}"),
    "nan-first": (replaced("first", lambda a: a * np.float32("nan")), "{first} holds values that"),
    "nan-last": (replaced("last", lambda a: a * np.float32("nan")), "{last} holds values that are"),
    "inf-first": (replaced("first", lambda a: a - np.float32("inf")), "{first} holds values that"),
    "inf-last": (replaced("last", lambda a: a + np.float32("inf")), "{last} holds values that are"),
    "inf-as-float32": (
        replaced("last", lambda a: a.astype("float64") * 1e300),
        "{last} holds values that are not finite",
    ),
    "int": (replaced("norm", lambda a: a.astype("int32")), "{norm} is of type int32 rather than"),
    "bool": (replaced("norm", lambda a: a > 1), "{norm} is of type bool rather than of floats"),
}


@both_families
@pytest.mark.parametrize("edit", EDITS)
def test_tensors_that_make_no_model(tmp_path, family, edit):
    change, match = EDITS[edit]
    path, names = save(tmp_path, family), NAMES[family]
    write(path, change(read(path), names))
    escaped = {key: re.escape(name) for key, name in vars(names).items() if key != "respelled"}
    for key, name in escaped.items():
        match = match.replace(f"{{{key}}}", name)
    assert_refused(path, match)


@both_families
def test_one_tensor_in_two_spellings(tmp_path, family):
    path, (new, old) = save(tmp_path, family), NAMES[family].respelled
    arrays = read(path)
    prefix = NAMES[family].block.format(1)
    prefix = "Transformer/" + prefix if family == "google" else prefix
    leaf = "scale" if family == "google" else ""
    for name in (new, old):
        arrays[f"{prefix}{name}{leaf}"] = np.ones(12, "float32")
    assert_refused(
        write(path, arrays),
        f"{re.escape(prefix + old + leaf)} and {re.escape(prefix + new + leaf)} are the same|"
        f"{re.escape(prefix + new + leaf)} and {re.escape(prefix + old + leaf)} are the same",
    )


@pytest.mark.parametrize(
    ("descr", "size"), [("'<U1'", 4), ("[('a', '<f2')]", 2), ("('<f2', (1,))", 2), ("'<c8'", 8)]
)
def test_strings_records_and_complex_numbers_are_no_floats(tmp_path, descr, size):
    """Records of two bytes are not taken for bfloat16."""
    name = NAMES["google"].norm
    content = npy_of_shape((12,), bytes(12 * size), descr)
    path = with_member(save(tmp_path), f"{name}.npy", content)
    assert_refused(path, f"{name} is of type .* rather than of floats|{name} .* does not fill")


def test_one_number_for_all_tensors_does_not_make_a_giant(tmp_path):
    """The shapes of a file make no model that is larger than the file."""
    path = save(tmp_path, "timm")
    arrays = read(path)
    arrays["patch_embed.proj.weight"] = np.ones((10**6, 1, 1, 1), "float32")
    arrays["blocks.0.mlp.fc1.weight"] = np.ones((10**6, 1), "float32")
    refusal = r"fewer numbers than|mis-shaped \(2\): patch_embed.proj.weight \(1000000,"
    assert_refused(write(path, arrays), refusal)


# What is a checkpoint, if not as we write it.


@both_families
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats(tmp_path, family, dtype):
    path = save(tmp_path, family)
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    write(path, {name: array.astype(dtype) for name, array in read(path).items()})
    assert_loads(path, [value.astype(dtype).astype("float32") for value in values(original())])


@pytest.mark.parametrize("change", [np.asfortranarray, lambda array: array.astype(">f4")])
def test_other_orders(tmp_path, change):
    path = save(tmp_path)
    changed = {name: change(array) for name, array in read(path).items()}
    assert_loads(write(path, changed), values(original()))


@both_families
def test_content_tells_the_format(tmp_path, family):
    path = save(tmp_path, family)
    for name in ("renamed.npz", "renamed.safetensors", "renamed.pt", "gewichte für ViT, 最終"):
        (tmp_path / name).write_bytes(path.read_bytes())
        keras_vit.load_weights(target(), tmp_path / name)
        assert_same_values(target(), values(original()))
        randomise(target(), seed=7)


def test_numbers_beside_the_model_are_left_alone(tmp_path):
    """big_vision stores integers beside the parameters, such as the optimizer's steps."""
    path = save(tmp_path)
    arrays = {f"params/{name}": array for name, array in read(path).items()}
    np.savez(path, **arrays, **{"opt/count": np.int32(90_000), "extra/name": np.array("vit")})
    assert_loads(path, values(original()))


@both_families
def test_read_only(tmp_path, family):
    path = save(tmp_path, family)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    assert_loads(path, values(original()))
    tmp_path.chmod(0o755)


# Pickles.


class Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def torch_zip(path, code):
    write_zip(path, [("m/data.pkl", code), ("m/data/0", bytes(48)), ("m/version", b"3\n")])


def pickled_member(path, code):
    """A good .npz file but for one array of objects."""
    with_member(save(path.parent), f"{NAMES['google'].norm}.npy", object_npy(code))
    (path.parent / FILES["google"]).rename(path)


def object_npy(code):
    return npy_of_shape((1,), code, "'|O'")


@pytest.mark.parametrize("name", ["model.pt", "model.npz", "model.safetensors"])
@pytest.mark.parametrize(
    ("write_file", "match"),
    [
        (lambda path, code: path.write_bytes(code), "the file is pickled.*weights_only=True"),
        (torch_zip, "the file is PyTorch's, whose pickle can run any code.*weights_only=True"),
        (pickled_member, "LayerNorm_1/scale is pickled, and a pickle can run any code"),
        (lambda path, code: path.write_bytes(object_npy(code)), "neither .npz nor .safetensors"),
    ],
    ids=["pickle", "torch-zip", "object-member", "object-npy"],
)
def test_no_pickle_is_executed(tmp_path, write_file, match, name):
    made, path = tmp_path / "made", tmp_path / name
    code = pickle.dumps(Touch(made), protocol=2)
    assert code.startswith(b"\x80\x02")
    write_file(path, code)
    assert_refused(path, match)
    assert not made.exists()
    pickle.loads(code)
    assert made.exists()  # the code was alive


# Archives that are made to harm.


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("../escaped.npy", r"unexpected \(1\): \.\./escaped"),
        ("/escaped.npy", r"unexpected \(1\): /escaped"),
        ("folder/", "must hold .npy files. Received: folder/"),
        ("nested.npz", "must hold .npy files. Received: nested.npz"),
        ("\x1b[2Jclear.npy", r"a tensor cannot be named '\\x1b\[2Jclear.npy'"),
        ("a" * 300 + ".npy", "a tensor cannot be named 'aaa"),
    ],
)
def test_members_that_are_no_tensors(tmp_path, name, match):
    path = with_member(save(tmp_path), name, npy(np.ones(3, "float32")))
    assert_refused(path, match)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_name_twice(tmp_path):
    path = save(tmp_path)
    members = [(f"{name}.npy", npy(array)) for name, array in read(path).items()]
    write_zip(path, [*members, members[3]])
    assert_refused(path, f"holds {members[3][0]} more than once")


@both_families
def test_too_many_tensors(tmp_path, family, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "MAX_TENSORS", 31)
    path = save(tmp_path, family)
    assert_refused(path, f"at most 31 tensors. Received: {len(read(path))}")


@both_families
def test_too_many_blocks(tmp_path, family, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "MAX_DEPTH", 1)
    assert_refused(save(tmp_path, family), "at most 1 blocks. Received: 2")


def test_too_many_blocks_in_one_tensor(tmp_path):
    """big_vision stacks the blocks of a model: each slice becomes a tensor."""
    path = save(tmp_path)
    stack = np.ones((200_000, 1), "float16")
    write(path, {**read(path), "Transformer/encoderblock/LayerNorm_0/scale": stack})
    with peak_below(20):
        assert_refused(path, "at most 1,000 blocks. Received: 200,000")


@pytest.mark.parametrize(
    ("offset", "form", "value", "match"),
    [
        (8, "<H", 1, "is encrypted"),
        (10, "<H", 99, r"must be stored or deflated.*\[0, 99\]"),
        (10, "<H", zipfile.ZIP_DEFLATED, "damaged"),
        (16, "<I", 12345, "Bad CRC-32"),
        (20, "<I", 7, "damaged"),
        (24, "<I", 7, "damaged"),
        (24, "<I", 400, "does not fill its 400 bytes"),
        (24, "<I", 2**31, "more than 20 times its size"),
        (42, "<I", 2**31, "damaged"),
    ],
)
def test_directory_that_lies(tmp_path, offset, form, value, match):
    """Flags, method, checksum, sizes and place of a member."""
    path = with_directory_field(save(tmp_path), offset, form, value)
    with peak_below(20):
        assert_refused(path, match)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_grow_without_a_limit(tmp_path, method):
    path = with_member(save(tmp_path), "cls.npy", npy(np.ones((1, 1, 12), "float32")), method)
    assert_refused(path, rf"must be stored or deflated.*\[{method}\]")


@pytest.fixture(scope="module")
def bomb():
    """64 MiB of zeros as an .npy file."""
    return npy(np.zeros(2**24, "float32"))


@pytest.mark.parametrize("name", ["cls.npy", "unused.npy"])
def test_zip_bomb(tmp_path, bomb, name):
    path = with_member(save(tmp_path), name, bomb, zipfile.ZIP_DEFLATED)
    with peak_below(20):
        assert_refused(path, "would expand to 67,126,..., more than 20 times its size")


def test_zip_bomb_that_says_it_is_small(tmp_path, bomb):
    """No more is expanded than the directory says, and its checksum is of what is expanded."""
    members = [(f"{name}.npy", npy(array)) for name, array in read(save(tmp_path)).items()]
    header = npy_of_shape((1, 1, 12))
    path = tmp_path / "bomb.npz"
    write_zip(path, [("cls.npy", header + bomb), *members[1:]], zipfile.ZIP_DEFLATED)
    with_directory_field(path, 24, "<I", len(header) + 48)
    with peak_below(20):
        assert_refused(path, "Bad CRC-32 for file 'cls.npy'")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy_of_shape((10**6, 10**6), bytes(48)), "does not fill its"),
        (npy_of_shape((10**30,), bytes(48)), "does not fill its"),
        (npy_of_shape((10**12, 0)), r"cannot be of the shape \(1000000000000, 0\)"),
        (npy_of_shape((-1, -12), bytes(48)), r"cannot be of the shape \(-1, -12\)"),
        (npy_of_shape("'12'", bytes(48)), "damaged"),
        (npy_of_shape((12,), bytes(48), "()"), "damaged"),
        (npy_of_shape((12,), bytes(48), "'<f3'"), "damaged"),
        (npy_of_shape((12,), bytes(48), "exit()"), "damaged"),
        (npy_that_says("-" * 9_000 + "1"), "damaged"),
        (npy_that_says("1" * 60_000), "damaged"),
        (b"\x93NUMPY\x09\x00", "damaged.*version"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "damaged"),
        (b"", "damaged"),
    ],
)
def test_npy_header_that_lies(tmp_path, content, match):
    path = with_member(save(tmp_path), "cls.npy", content)
    with peak_below(20):
        assert_refused(path, match)


def test_safetensors_without_bytes(tmp_path):
    """A tensor without rows takes no bytes, whatever the other axes: they are not believed."""

    def edit(header):
        fields = header["blocks.0.mlp.fc1.weight"]
        header["empty"] = {**fields, "shape": [0, 10**12], "data_offsets": [0, 0]}

    assert_refused(
        with_header(save(tmp_path, "timm"), edit), r"empty cannot be of the shape \(0, 1"
    )


# Several files.


def write_shards(folder, index=None):
    """The timm file in two parts with an index, of which `index` changes the weight map."""
    folder.mkdir()
    whole = save(folder, "timm")
    arrays = read(whole)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for shard in sorted(set(weight_map.values())):
        part = {name: array for name, array in arrays.items() if weight_map[name] == shard}
        write(folder / shard, part, metadata(whole))
    whole.unlink()
    path = folder / "model.safetensors.index.json"
    weight_map = index(weight_map) if index else weight_map
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards(tmp_path):
    path = write_shards(tmp_path / "sharded")
    assert_loads(path, values(original()))
    keras_vit.load_weights(target(), path.parent)
    assert_same_values(target(), values(original()))
    randomise(target(), seed=7)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"norm.weight": "part-2.safetensors"}, "shard 'part-2.safetensors' is not beside"),
        ({"norm.weight": "../other.safetensors"}, r"shard '\.\./other.safetensors' is not beside"),
        ({"norm.weight": "{tmp_path}/other.safetensors"}, "shard '/.*' is not beside the index"),
        ({"norm.weight": ".."}, r"shard '\.\.' is not beside the index"),
        ({"norm.weight": ""}, "shard '' is not beside the index"),
        ({"norm.weight": 3}, "shard '3' is not beside the index"),
        ({"norm.weight": ["part-0.safetensors"]}, "shard .* is not beside the index"),
        ({"head.gain": "part-0.safetensors"}, "the shards lack head.gain"),
        ({"\x1b[2J": "part-0.safetensors"}, r"a tensor cannot be named '\\x1b\[2J'"),
    ],
)
def test_index_of_shards_that_are_not_there(tmp_path, change, match):
    save(tmp_path, "timm").rename(tmp_path / "other.safetensors")
    change = json.loads(json.dumps(change).replace("{tmp_path}", str(tmp_path)))
    path = write_shards(tmp_path / "sharded", lambda weight_map: weight_map | change)
    assert_refused(path, match)


def test_index_that_names_the_wrong_shard(tmp_path):
    swap = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    path = write_shards(
        tmp_path / "sharded",
        lambda weight_map: {name: swap[shard] for name, shard in weight_map.items()},
    )
    assert_refused(path, "the shards lack blocks.0.attn.proj.bias.* and 22 more")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "damaged or cannot be read"),
        ("[]", r"must hold a JSON object. Received: \[\]"),
        ("{}", "`weight_map` must be an object.*weight_map=None"),
        ('{"weight_map": ["part-0.safetensors"]}', "`weight_map` must be an object"),
        ('{"weight_map": {}}', "holds no tensors"),
    ],
)
def test_index_that_is_none(tmp_path, text, match):
    path = write_shards(tmp_path / "sharded")
    path.write_text(text)
    assert_refused(path, match)


def test_damaged_shard(tmp_path):
    path = write_shards(tmp_path / "sharded")
    shard = path.parent / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(path, "damaged", blamed=shard)


def test_folders(tmp_path):
    assert_refused(tmp_path, "must hold model.safetensors.*Received: no such file")
    path = save(tmp_path)
    (tmp_path / "._weights.npz").write_bytes(b"what macOS leaves beside a file")
    keras_vit.load_weights(target(), tmp_path)
    assert_same_values(target(), values(original()))
    randomise(target(), seed=7)
    save(tmp_path, "timm")
    assert_refused(tmp_path, "Received: weights.npz, weights.safetensors")
    path.unlink()
    (tmp_path / "weights.safetensors").rename(tmp_path / "folder.bin")
    assert_refused(tmp_path, "Received: no such file")


# Configurations.


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "damaged or cannot be read"),
        (b"{'image_size': 8}", "damaged or cannot be read"),
        (b"\xff\xfe{}", "damaged or cannot be read"),
        (b"[" * 100_000, "damaged or cannot be read"),
        (b"[8]", r"must hold a JSON object. Received: \[8\]"),
        (b'"' + b"a" * 10_000 + b'"', "must hold a JSON object. Received: 'aaaaaaaaaaaa"),
        (
            b'{"image_size": -1}',
            "image_size must be an int from 1 to 10,000 or two. Received: .*=-1",
        ),
        (b'{"image_size": [8, 8, 3]}', r"image_size must be .*=\[8, 8, 3\]"),
        (b'{"image_size": [8, "8"]}', r"image_size must be .*=\[8, '8'\]"),
        (b'{"image_size": true}', "image_size must be .*=True"),
        (b'{"image_size": 1e400}', "image_size must be .*=inf"),
        (
            b'{"num_attention_heads": 0}',
            "num_attention_heads must be an int from 1 to 10,000. .*=0",
        ),
        (b'{"num_attention_heads": "abc"}', "num_attention_heads must be an int.*='abc'"),
        (b'{"num_attention_heads": 10001}', "must be an int from 1 to 10,000.*=10001"),
        (b'{"layer_norm_eps": NaN}', "layer_norm_eps must be a number from 0 on. .*=nan"),
        (b'{"layer_norm_eps": "1e-6"}', "layer_norm_eps must be a number"),
        (b'{"rescale_factor": 0}', "rescale_factor must be a number above 0. Received: .*=0"),
        (b'{"hidden_act": ["gelu"]}', "hidden_act must be a string"),
        (b'{"global_pool": {}}', "global_pool must be a string"),
        (b'{"image_mean": 0.5}', "image_mean must be a list of numbers. .*=0.5"),
        (b'{"image_std": [0.5, null, 0.5]}', "image_std must be a list of numbers"),
        (b'{"normalization": [1, 2, 3]}', "normalization must be two lists of numbers"),
        (b'{"pretrained_cfg": []}', "pretrained_cfg must be an object"),
        (b'{"pretrained_cfg": {"input_size": 224}}', "input_size must be three ints from 1"),
        (b'{"pretrained_cfg": {"mean": "0.5"}}', "mean must be a list of numbers"),
        (b'{"model_args": {"num_heads": 0.5}}', "num_heads must be an int"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_configuration_of_nonsense(tmp_path, name, text, match):
    path = save(tmp_path)
    (tmp_path / name).write_bytes(text)
    assert_refused(path, match, blamed=tmp_path / name)


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ("[]", r"must hold a JSON object. Received: \[\]"),
        ('{"num_heads": 0}', "num_heads must be an int from 1 to 10,000. Received: num_heads=0"),
        ('{"num_heads": 5}', "divisible by `num_heads`.*num_heads=5"),
        ('{"gelu": 3}', "gelu must be a string"),
        ('{"num_heads": 2, "gelu": "relu"}', "`gelu` must be.*'relu'"),
        ('{"num_heads": 2, "normalization": [[0.5, 0.5], [1, 1]]}', "`normalization` must be"),
    ],
)
def test_metadata_of_nonsense(tmp_path, facts, match):
    path = save(tmp_path, "timm")
    write(path, read(path), {"keras_vit": facts})
    with pytest.raises(ValueError, match=match) as caught:
        keras_vit.from_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"num_attention_heads": 5}, "`hidden_dim` must be divisible by `num_heads`"),
        ({"image_mean": [0.4] * 4, "image_std": [0.5] * 4}, "`normalization` must be numbers"),
        ({"image_mean": [127.5] * 3, "image_std": [0.5] * 3}, "`normalization` must be numbers"),
        ({"hidden_act": "relu"}, "must name an activation of gelu.*'relu'"),
    ],
)
def test_configuration_of_another_model(tmp_path, config, match):
    path = tmp_path / "model.safetensors"
    path.write_bytes((DATA / "hf_vit" / "weights.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3, **config}))
    with pytest.raises(ValueError, match=match) as caught:
        keras_vit.from_checkpoint(path)
    assert str(path) in str(caught.value)


# What a load leaves behind.


def open_files(folder):
    """Those in a folder that this process has open. Others may come and go beside a test."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [name for name in names if name.startswith(str(folder))]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@both_families
def test_files_are_closed(tmp_path, family):
    path = save(tmp_path, family)
    damaged = tmp_path / f"damaged{path.suffix}"
    damaged.write_bytes(path.read_bytes())
    write(damaged, EDITS["nan-last"][0](read(damaged), NAMES[family]))
    model = keras_vit.from_checkpoint(path)
    keras_vit.load_weights(model, path)
    with pytest.raises(ValueError, match="not finite"):
        keras_vit.from_checkpoint(damaged)
    assert not open_files(tmp_path)
    with path.open():
        assert open_files(tmp_path) == [str(path)]
    assert str(tmp_path) not in pathlib.Path("/proc/self/maps").read_text()


@both_families
def test_a_file_may_be_overwritten_once_it_is_loaded(tmp_path, family):
    path = save(tmp_path, family)
    model = keras_vit.from_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_values(model, values(original()))
    path.unlink()
    assert_same_values(model, values(original()))


def test_an_unknown_interpolation_changes_nothing(tmp_path):
    path = save(tmp_path, "timm")
    before = values(target())
    with pytest.raises(ValueError, match=r"`interpolation` must be one of.*'nearest'"):
        keras_vit.load_weights(target(), path, interpolation="nearest")
    assert_same_values(target(), before)
