"""How long the loading of a checkpoint takes, and how much memory: keras-vit and timm in turns.

    python benchmarks/loading.py

A ViT-B/16 of random weights, written by keras-vit in the formats of Google and timm. A call builds
the model and gives it the weights of the file. Memory is what a call takes beyond what the process
held before it: the model, and what is read at the time, pages of the file that it maps among it. It
is told by a second process, without oneDNN, which gives back what it frees. Call after call, a
process holds more: Keras' models are freed when Python looks for cycles.
"""

import pathlib
import statistics
import tempfile

from harness import (
    Contender,
    compare_with_memory,
    described,
    draw,
    markdown,
    parser,
    save,
    versions_line,
)

VARIANT, QUICK_VARIANT = "B/16", "Ti/16"
TIMM = {VARIANT: "vit_base_patch16_224", QUICK_VARIANT: "vit_tiny_patch16_224"}
FILES = {"google": "google.npz", "timm": "timm.safetensors"}


def ours(path):
    import keras_vit

    def make(_):
        def run(calls):
            for _ in range(calls):
                keras_vit.from_checkpoint(path)

        return run

    return make, None


def timm(path, name):
    import timm

    def make(_):
        def run(calls):
            for _ in range(calls):
                timm.create_model(name, checkpoint_path=path)

        return run

    return make, None


def contenders(variant, paths):
    """Name -> contender."""

    def one(build, environment, path, *packages, **options):
        options = {"path": str(path), **options}
        return Contender(build, environment, packages, options)

    named = {
        f"keras-vit, {path.name}": one(ours, None, path, "keras", "tensorflow")
        for path in paths.values()
    }
    path = paths["timm"]
    named[f"timm, {path.name}"] = one(timm, "timm", path, "torch", "timm", name=TIMM[variant])
    return named


def table(result):
    rows, versions = [], {}
    for name, entry in result["contenders"].items():
        size = entry["file_bytes"]
        row = [name, f"{size / 1e6:.1f}"]
        if "missing" in entry:
            rows.append([*row, f"missing: {entry['missing']}", "", ""])
            continue
        versions |= entry["versions"]
        times = [f(entry["seconds"]) for f in (min, statistics.median)]
        row.append(", ".join(f"{time:.2f}" for time in times))
        row.append(f"{times[0] * 1e8 / size:.2f}")
        row.append(f"{entry['call_bytes'] / size:.2f}" if entry["call_bytes"] else "")
        rows.append(row)
    columns = ("", "MB", "s: min, median", "s per 100 MB", "memory / file")
    return f"{markdown(columns, rows)}\n{versions_line(versions)}\n{described(result)}"


def plot(result, path):
    entries = {k: v for k, v in result["contenders"].items() if "missing" not in v}

    def panel(axes):
        colors = ["C1" if name.startswith("keras-vit") else "C0" for name in entries]
        axes.barh(list(entries), [min(v["seconds"]) for v in entries.values()], color=colors)
        axes.invert_yaxis()
        axes.set_title(f"{result['variant']}: seconds to load")

    draw(path, [panel])


def main():
    import keras_vit

    quick = parser(__doc__).parse_args().quick
    variant = QUICK_VARIANT if quick else VARIANT
    model = keras_vit.build_vit(variant, gelu="tanh")
    with tempfile.TemporaryDirectory() as folder:
        paths = {family: pathlib.Path(folder) / name for family, name in FILES.items()}
        for family, path in paths.items():
            keras_vit.save_checkpoint(model, path, family)
        files = {path.name: path.stat().st_size for path in paths.values()}
        [measured] = compare_with_memory(
            contenders(variant, paths), [None], rounds=1 if quick else 3, turn=0
        )
    entries = {
        name: {"file_bytes": files[name.split(", ")[1]], **entry}
        for name, entry in measured["contenders"].items()
    }
    save("loading", quick, variant=variant, contenders=entries)


if __name__ == "__main__":
    main()
