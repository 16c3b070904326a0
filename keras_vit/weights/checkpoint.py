"""Reading checkpoint files: named tensors, of which nothing is read before it is asked for.

A file is data: no pickle and no code in it is ever executed. What a file says of itself (shapes,
sizes, its configuration) is checked before memory is taken for it. Every error is a ValueError that
names the file. An .npz file has a checksum for each tensor; a safetensors file has none, so that a
number changed in it goes unnoticed unless it is no longer finite.
"""

import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import reprlib
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors

# Weights hardly compress; an archive that grows more than this is no checkpoint.
MAX_EXPANSION = 20
MAX_TENSORS = 20_000  # eight times those of the largest ViT with its optimizer's state
MAX_DEPTH = 1_000  # the deepest have 50 blocks
CONVERT = (
    "Convert it where PyTorch is installed: "
    "`safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')`."
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Args:
        name: Its name in the file.
        shape: Its shape.
        read: Reads it, as an array of that shape and any float dtype.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, and what stands beside them.

    Args:
        path: The file that was opened.
        tensors: Name -> `Tensor`.
        config: What the file says of its model: config.json beside it, preprocessor_config.json,
            and the metadata that `save_checkpoint` writes.
    """

    path: pathlib.Path
    tensors: dict[str, Tensor]
    config: dict

    def error(self, message):
        """A ValueError that names the file, once."""
        start = f"{self.path}: "
        return ValueError(start + str(message).removeprefix(start))

    def shape(self, name, rank=1):
        """The shape of a tensor; ValueError if it is missing, empty or of another rank."""
        if name not in self.tensors:
            raise self.error(f"the tensor {name!r} is missing.")
        shape = self.tensors[name].shape
        if len(shape) != rank or 0 in shape:
            raise self.error(
                f"{name} must have {rank} axes, none of them empty. Received: shape {shape}."
            )
        return shape

    def outputs(self, bias, kernel, axis):
        """The outputs of a dense layer, also of one without a bias; 0 if there is none."""
        if bias in self.tensors:
            return self.shape(bias)[0]
        return self.shape(kernel, 2)[axis] if kernel in self.tensors else 0

    def count(self, pattern, first=0):
        """How many i, from `first` on and without a gap, `pattern` has a tensor for.

        ValueError if that is more than a model has: it would take forever to build.
        """
        count = 0
        while pattern.format(i=first + count) in self.tensors:
            count += 1
        if count > MAX_DEPTH:
            raise self.error(f"a model has at most {MAX_DEPTH:,} blocks. Received: {count:,}.")
        return count

    def renamed(self, rename):
        """A copy whose names are `rename(name)`; tensors it gives None for are left out."""
        tensors = {}
        for name, tensor in self.tensors.items():
            new = rename(name)
            if new in tensors:
                raise self.error(f"{name} and {tensors[new].name} are the same tensor.")
            if new is not None:
                tensors[new] = tensor
        return dataclasses.replace(self, tensors=tensors)

    def reshaped(self, name, shape):
        """A copy in which the tensor `name`, if there is one, has another shape."""
        tensor = self.tensors.get(name)
        if tensor is None or math.prod(tensor.shape) != math.prod(shape):
            return self
        changed = Tensor(tensor.name, tuple(shape), lambda: tensor.read().reshape(shape))
        return dataclasses.replace(self, tensors={**self.tensors, name: changed})


def open_checkpoint(path):
    """Opens a checkpoint without reading its tensors.

    Args:
        path: A .npz or .safetensors file, the index of a sharded one
            (model.safetensors.index.json), or a folder that holds one of them. The content of a
            file tells its format, not its name.

    Returns:
        A `Checkpoint`.

    Raises:
        ValueError: The file is missing, empty, truncated, pickled or of no known format, or it or
            the configuration beside it says what cannot be.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _checkpoint_in(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint file.")
    config = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (path.parent / name).is_file():
            config |= _checked_facts(path.parent / name, _read_json(path.parent / name))
    tensors, metadata = _opener(path)(path)
    if not tensors:
        raise ValueError(f"{path}: the file holds no tensors.")
    return Checkpoint(path, tensors, config | metadata)


def _checkpoint_in(folder):
    """The one checkpoint of a folder."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return folder / name
    found = [*folder.glob("[!.]*.safetensors"), *folder.glob("[!.]*.npz")]
    if len(found) != 1:
        names = listed(sorted(path.name for path in found)) or "no such file"
        raise ValueError(
            f"{folder}: the folder must hold model.safetensors, model.safetensors.index.json, or "
            f"one .safetensors or .npz file. Received: {names}."
        )
    return found[0]


def _opener(path):
    """The function that opens a file: path -> its tensors by name, and its metadata."""
    with _as_value_error(path), open(path, "rb") as file:
        start = file.read(16)
    if path.name.endswith(".index.json"):
        return _open_shards
    if start.startswith(b"PK"):
        return _open_npz
    if start[8:9] == b"{":
        return _open_safetensors
    raise ValueError(f"{path}: {_why_not(start)}")


def _why_not(start):
    """Why a file that starts with these bytes is not read."""
    if not start:
        return "the file is empty."
    if start.startswith(b"\x80"):
        return f"the file is pickled, and a pickle can run any code: it is not read. {CONVERT}"
    if start.startswith(b"\x89HDF"):
        return "the file is HDF5: use the `load_weights` of a Keras model, or keras.saving."
    return "the file is neither .npz nor .safetensors, or its start is damaged."


@contextlib.contextmanager
def _as_value_error(path):
    """Turns whatever a library raises of a damaged file into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: the file is damaged or cannot be read ({reason}).") from error


# What stands beside the tensors.


def _read_json(path):
    with _as_value_error(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    return _checked_object(path, value)


def _checked_object(path, value):
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: the file must hold a JSON object. Received: {reprlib.repr(value)}."
        )
    return value


def _is_count(value):
    return type(value) is int and 0 < value <= 10_000


def _is_number(value):
    return type(value) in (int, float) and 0 <= value < 1e6  # False for NaN


def _is_list(value, of, lengths=range(1, 100)):
    return isinstance(value, list) and len(value) in lengths and all(map(of, value))


# The facts that the families use, wherever they stand in a configuration, and what they must be.
FACTS = (
    ("num_heads num_attention_heads", "an int from 1 to 10,000", _is_count),
    (
        "image_size",
        "an int from 1 to 10,000 or two",
        lambda value: _is_count(value) or _is_list(value, _is_count, (2,)),
    ),
    ("input_size", "three ints from 1 to 10,000", lambda value: _is_list(value, _is_count, (3,))),
    ("layer_norm_eps layer_norm_epsilon", "a number from 0 on", _is_number),
    ("rescale_factor", "a number above 0", lambda value: _is_number(value) and value > 0),
    (
        "hidden_act gelu global_pool act_layer architecture",
        "a string",
        lambda value: isinstance(value, str),
    ),
    (
        "image_mean image_std mean std",
        "a list of numbers",
        lambda value: _is_list(value, _is_number),
    ),
    (
        "normalization",
        "two lists of numbers",
        lambda value: _is_list(value, lambda numbers: _is_list(numbers, _is_number), (2,)),
    ),
    ("pretrained_cfg model_args", "an object", lambda value: isinstance(value, dict)),
)


def _checked_facts(path, facts):
    """`facts`, if what is used of them is of the type that it must be; what is null is left out.

    Not `normalization`, whose null is that of a model that takes normalised images.
    """
    for names, expected, fits in FACTS:
        for name in names.split():
            value = facts.get(name)
            if value is not None and not fits(value):
                raise ValueError(
                    f"{path}: {name} must be {expected}. Received: {name}={reprlib.repr(value)}."
                )
    return {
        name: _checked_facts(path, value) if isinstance(value, dict) else value
        for name, value in facts.items()
        if value is not None or name == "normalization"
    }


# The formats.


def _check_shape(path, name, shape, most):
    """ValueError for negative axes, and for axes beside one of 0 that no file pays for in bytes."""
    if any(n < 0 for n in shape) or math.prod(max(n, 1) for n in shape) > most:
        raise ValueError(f"{path}: {name} cannot be of the shape {shape}.")


def _check_floats(path, name, dtype):
    if dtype.kind != "f" and dtype != ml_dtypes.bfloat16:
        raise ValueError(f"{path}: {name} is of type {dtype} rather than of floats.")


def _check_names(path, names):
    """ValueError for too many names, one that is there twice, and what no tensor is called."""
    if len(names) > MAX_TENSORS:
        raise ValueError(
            f"{path}: a checkpoint must hold at most {MAX_TENSORS:,} tensors. "
            f"Received: {len(names):,}."
        )
    for name, count in collections.Counter(names).items():
        if not name.isprintable() or len(name) > 200:
            raise ValueError(f"{path}: a tensor cannot be named {reprlib.repr(name)}.")
        if count > 1:
            raise ValueError(f"{path}: the file holds {name} more than once.")


def _open_safetensors(path):
    """The tensors of one file, and the facts that `save_checkpoint` put into its metadata."""
    with _as_value_error(path), safetensors.safe_open(path, framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        facts = json.loads((file.metadata() or {}).get("keras_vit", "{}"))

    def reader(name):
        def read():
            # Opened anew for each: an open file keeps all that was read of it in memory.
            with _as_value_error(path), safetensors.safe_open(path, framework="numpy") as file:
                array = file.get_tensor(name)
            _check_floats(path, name, array.dtype)
            return array

        return read

    _check_names(path, list(shapes))
    for name, shape in shapes.items():
        _check_shape(path, name, shape, most=path.stat().st_size)
    tensors = {name: Tensor(name, shape, reader(name)) for name, shape in shapes.items()}
    return tensors, _checked_facts(path, _checked_object(path, facts))


def _open_shards(path):
    """The tensors of all files of an index, and the facts of the first that has any."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{path}: `weight_map` must be an object of tensors and their files. "
            f"Received: weight_map={reprlib.repr(weight_map)}."
        )
    _check_names(path, list(weight_map))
    shards, facts = {}, {}
    for name in sorted(set(map(str, weight_map.values()))):
        if pathlib.PurePath(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"{path}: the shard {name!r} is not beside the index.")
        shards[name], metadata = _open_safetensors(path.parent / name)
        facts = facts or metadata
    if missing := [name for name, shard in weight_map.items() if name not in shards[str(shard)]]:
        raise ValueError(f"{path}: the shards lack {listed(missing)}.")
    return {name: shards[shard][name] for name, shard in weight_map.items()}, facts


def _open_npz(path):
    """The tensors of a NumPy archive; only the headers are read."""
    with _as_value_error(path):
        archive = zipfile.ZipFile(path)
        _check_end(path)
    members = archive.infolist()
    _check_members(path, members)
    _check_expansion(path, members)
    tensors = [_npz_tensor(path, archive, member) for member in members]
    most = sum(member.file_size for member in members)
    for tensor in tensors:
        _check_shape(path, tensor.name, tensor.shape, most)
    return {tensor.name: tensor for tensor in tensors}, _npz_facts(path, archive.comment)


def _check_end(path):
    """ValueError if the comment at the end of an archive is cut off, which zipfile overlooks.

    Source: PKWARE APPNOTE 6.3.10, Section 4.3.16: 22 bytes, whose last two are its length.
    """
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 22 - 0xFFFF, 0))
        end = file.read()
    end = end[end.rindex(b"PK\5\6") :]
    if len(end) < 22 + int.from_bytes(end[20:22], "little"):
        raise ValueError("its end is missing")


def _npz_facts(path, comment):
    """The facts that `save_checkpoint` put into the comment of an archive."""
    try:
        facts = json.loads(comment)["keras_vit"]
    except (ValueError, LookupError, TypeError, RecursionError):  # somebody else's, or none
        return {}
    return _checked_facts(path, _checked_object(path, facts))


def _check_members(path, members):
    """ValueError unless they are .npy files."""
    names = [member.filename for member in members]
    _check_names(path, names)
    if any(name.endswith("data.pkl") for name in names):
        raise ValueError(
            f"{path}: the file is PyTorch's, whose pickle can run any code: it is not read. "
            f"{CONVERT}"
        )
    if "model.weights.h5" in names:
        raise ValueError(f"{path}: the file is a Keras model: use keras.saving.load_model.")
    if others := [name for name in names if not name.endswith(".npy")]:
        raise ValueError(f"{path}: the archive must hold .npy files. Received: {listed(others)}.")


def _check_expansion(path, members):
    """ValueError for a zip bomb; of the ways to compress, NumPy's is the only one with a limit."""
    size, expanded = path.stat().st_size, sum(member.file_size for member in members)
    if expanded > MAX_EXPANSION * size:
        raise ValueError(
            f"{path}: the archive of {size:,} bytes would expand to {expanded:,}, more than "
            f"{MAX_EXPANSION} times its size: it is no checkpoint."
        )
    methods = {member.compress_type for member in members}
    if not methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError(
            f"{path}: the archive must be stored or deflated, as NumPy writes it. "
            f"Received: the zip methods {sorted(methods)}."
        )


def _npz_tensor(path, archive, member):
    name = member.filename.removesuffix(".npy")
    with _as_value_error(path), archive.open(member) as file:
        shape, dtype = _npy_header(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{path}: {name} is pickled, and a pickle can run any code: it is not read."
        )
    if start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(
            f"{path}: {name} of shape {shape} and type {dtype} does not fill its "
            f"{member.file_size:,} bytes."
        )
    # NumPy stores bfloat16, which it does not know, as two bytes of no type.
    known = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype

    def read():
        _check_floats(path, name, known)
        with _as_value_error(path), archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read()  # to the end, where the checksum is compared
        return array.view(known)

    return Tensor(name, shape, read)


def _npy_header(file):
    """Shape and dtype at the start of an .npy file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, _, dtype = readers[version](file)
    return shape, dtype


def listed(names, most=10):
    """Names with commas; of many, the first."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
