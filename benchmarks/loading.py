"""Time and memory of loading a checkpoint, in a process of its own for each.

    python benchmarks/loading.py                       # a B/16 of random weights in each format
    python benchmarks/loading.py PATH [PATH ...]       # printed alone: checkpoints of your own

Memory is the peak of the resident set (Linux), less what it was when the imports and a first small
model were done: the weights of the new model, which are float32, what is read at the time, and some
20 MB that any Keras model of this depth costs. A file of half precision doubles when it becomes a
model of float32.
"""

import pathlib
import statistics
import tempfile

from harness import Contender, compare, described, markdown, parser, result_of, save


def loading(path):
    import keras_vit

    def make(case):
        keras_vit.build_vit(keras_vit.ViTConfig(32, 1, 2, 32, 4), image_size=8)  # starts Keras

        def run(calls):
            for _ in range(calls):
                keras_vit.from_checkpoint(path)

        return run

    return make, None


def make_checkpoints(folder, variant):
    """A model of random weights in the formats of Google and timm."""
    import keras_vit

    model = keras_vit.build_vit(variant, gelu="tanh")
    name = variant.replace("/", "_")
    paths = [folder / f"{name}.npz", folder / f"{name}.safetensors"]
    for path, family in zip(paths, ("google", "timm"), strict=True):
        keras_vit.save_checkpoint(model, path, family)
    return paths


def table(result):
    rows = []
    for name, file in result["files"].items():
        if "missing" in file:
            rows.append((name, f"missing: {file['missing']}"))
            continue
        per_100_mb = [1e8 * seconds / file["bytes"] for seconds in file["seconds"]]
        memory = file["peak_bytes"] - file["resident_bytes"]
        rows.append(
            (
                name,
                f"{file['bytes'] / 1e6:.1f}",
                f"{min(per_100_mb):.2f}, {statistics.median(per_100_mb):.2f}",
                f"{memory / file['bytes']:.2f}",
            )
        )
    columns = ("file", "MB", "s per 100 MB: min, median", "memory / file")
    return markdown(columns, rows) + "\n" + described(result)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("path", nargs="*", type=pathlib.Path)
    arguments = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.path or make_checkpoints(
            pathlib.Path(folder), "Ti/16" if arguments.quick else "B/16"
        )
        paths = {str(path) if arguments.path else path.name: path for path in paths}
        contenders = {
            name: Contender(loading, packages=("keras",), options={"path": str(path)})
            for name, path in paths.items()
        }
        [measured] = compare(contenders, [None], rounds=2 if arguments.quick else 5, turn=0)
        files = {
            name: {"bytes": path.stat().st_size, **measured["contenders"][name]}
            for name, path in paths.items()
        }
    if arguments.path:  # checkpoints of one's own are no result to keep
        print("\n" + table(result_of("loading", arguments.quick, files=files)))
    else:
        save("loading", arguments.quick, files=files)


if __name__ == "__main__":
    main()
