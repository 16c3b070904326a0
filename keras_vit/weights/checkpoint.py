"""Reading checkpoint files: named tensors, of which nothing is read before it is asked for.

A file is data: no pickle and no code in it is ever executed. What a file says of itself (shapes,
sizes) is checked before memory is taken for it.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors

# Weights hardly compress; an archive that grows more than this is no checkpoint.
MAX_EXPANSION = 20
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
        """A ValueError that names the file."""
        return ValueError(f"{self.path}: {message}")

    def shape(self, name, rank=None):
        """The shape of a tensor; ValueError if it is missing or of another rank."""
        if name not in self.tensors:
            raise self.error(f"the tensor {name!r} is missing.")
        shape = self.tensors[name].shape
        if rank is not None and len(shape) != rank:
            raise self.error(f"{name} must have {rank} axes. Received: shape {shape}.")
        return shape

    def count(self, pattern):
        """How many i, from 0 on and without a gap, `pattern` has a tensor for."""
        count = 0
        while pattern.format(i=count) in self.tensors:
            count += 1
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
            (model.safetensors.index.json), or a folder that holds one of them.

    Returns:
        A `Checkpoint`.

    Raises:
        ValueError: The file is missing, empty, truncated, pickled or of no known format.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _checkpoint_in(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint file.")
    config = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (path.parent / name).is_file():
            config |= _read_json(path.parent / name)
    with open(path, "rb") as file:
        start = file.read(16)
    if path.name.endswith(".index.json"):
        tensors = _open_shards(path)
    elif start.startswith(b"PK\x03\x04"):
        tensors = _open_npz(path)
    elif start[8:9] == b"{":
        tensors, metadata = _open_safetensors(path)
        config |= metadata
    else:
        raise ValueError(f"{path}: {_why_not(start)}")
    if not tensors:
        raise ValueError(f"{path}: the file holds no tensors.")
    return Checkpoint(path, tensors, config)


def _checkpoint_in(folder):
    """The one checkpoint of a folder."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return folder / name
    found = [*folder.glob("*.safetensors"), *folder.glob("*.npz")]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found)) or "no such file"
        raise ValueError(
            f"{folder}: the folder must hold model.safetensors, model.safetensors.index.json, or "
            f"one .safetensors or .npz file. Received: {names}."
        )
    return found[0]


def _why_not(start):
    """Why a file that starts with these bytes is not read."""
    if not start:
        return "the file is empty."
    if start.startswith(b"\x80"):
        return f"the file is pickled, and a pickle can run any code: it is not read. {CONVERT}"
    if start.startswith(b"\x89HDF"):
        return "the file is HDF5. Expected: .npz or .safetensors."
    return "the file is neither .npz nor .safetensors, or its start is damaged."


def _read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the file cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: the file must hold a JSON object. Received: {value!r}.")
    return value


@contextlib.contextmanager
def _as_value_error(path):
    """Turns what the libraries raise of a damaged file into a ValueError that names it."""
    try:
        yield
    except (
        safetensors.SafetensorError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        KeyError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{path}: the file is damaged ({error}).") from error


def _open_safetensors(path):
    """The tensors of one file, and the facts that `save_checkpoint` put into its metadata."""
    with _as_value_error(path):
        file = safetensors.safe_open(path, framework="numpy")
        metadata = (file.metadata() or {}).get("keras_vit", "{}")
        facts = json.loads(metadata)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def reader(name):
        def read():
            with _as_value_error(path):
                return file.get_tensor(name)

        return read

    tensors = {name: Tensor(name, shape, reader(name)) for name, shape in shapes.items()}
    return tensors, facts if isinstance(facts, dict) else {}


def _open_shards(path):
    """The tensors of all files of an index."""
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path}: the index must have a `weight_map`.")
    tensors = {}
    for name in sorted(set(map(str, shards.values()))):
        if pathlib.PurePath(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"{path}: the shard {name!r} is not beside the index.")
        tensors |= _open_safetensors(path.parent / name)[0]
    if missing := sorted(set(shards) - set(tensors)):
        raise ValueError(f"{path}: the shards lack {listed(missing)}.")
    return {name: tensors[name] for name in shards}


def _open_npz(path):
    """The tensors of a NumPy archive; only the headers are read."""
    with _as_value_error(path):
        archive = zipfile.ZipFile(path)
        members = archive.infolist()
    names = [member.filename for member in members]
    if any(name.endswith("data.pkl") for name in names):
        raise ValueError(
            f"{path}: the file is PyTorch's, whose pickle can run any code: it is not read. "
            f"{CONVERT}"
        )
    if "model.weights.h5" in names:
        raise ValueError(f"{path}: the file is a Keras model: use keras.saving.load_model.")
    if others := [name for name in names if not name.endswith(".npy")]:
        raise ValueError(f"{path}: the archive must hold .npy files. Received: {listed(others)}.")
    size, expanded = path.stat().st_size, sum(member.file_size for member in members)
    if expanded > MAX_EXPANSION * size:
        raise ValueError(
            f"{path}: the archive of {size:,} bytes would expand to {expanded:,}, more than "
            f"{MAX_EXPANSION} times its size: it is no checkpoint."
        )
    with _as_value_error(path):
        tensors = [_npz_tensor(archive, member) for member in members]
    return {tensor.name: tensor for tensor in tensors}


def _npz_tensor(archive, member):
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as file:
        shape, dtype = _npy_header(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} is pickled, and a pickle can run any code: it is not read")
    if start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{name} of shape {shape} does not fill its {member.file_size} bytes")

    def read():
        with _as_value_error(archive.filename), archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read()  # to the end, where the checksum is compared
        # NumPy stores bfloat16, which it does not know, as two bytes of no type.
        return array.view(ml_dtypes.bfloat16) if dtype.str == "|V2" else array

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
    if dtype.kind not in "fOV" or (dtype.kind == "V" and dtype.str != "|V2"):
        raise ValueError(f"a tensor is of type {dtype} rather than of floats")
    return shape, dtype


def listed(names, most=10):
    """Names with commas; of many, the first."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
