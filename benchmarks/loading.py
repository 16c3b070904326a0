"""Time and memory of loading a checkpoint, in a process of its own for each.

    python benchmarks/loading.py                       # a B/16 of random weights in each format
    python benchmarks/loading.py PATH [PATH ...]       # checkpoints of your own

Memory is the peak of the resident set (Linux), less what it was when the imports and a first small
model were done: the weights of the new model, which are float32, what is read at the time, and some
20 MB that any Keras model of this depth costs.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

MEASURE = """
import json, pathlib, sys, time, warnings
import keras_vit

warnings.simplefilter("ignore")

def status(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name))
    return int(line.split()[1]) * 1024

keras_vit.build_vit(keras_vit.ViTConfig(32, 1, 2, 32, 4), image_size=8)  # starts the backend
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = status("VmRSS")
start = time.perf_counter()
model = keras_vit.from_checkpoint(sys.argv[1])
seconds = time.perf_counter() - start
peak = status("VmHWM") - before
print(json.dumps({"seconds": seconds, "bytes": peak, "weights": 4 * model.count_params()}))
"""


def measure(path):
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, path], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def make_checkpoints(folder):
    """A B/16 in the formats of Google and timm."""
    import keras_vit

    model = keras_vit.build_vit("B/16", gelu="tanh")
    paths = [folder / "B_16.npz", folder / "B_16.safetensors"]
    for path, family in zip(paths, ("google", "timm"), strict=True):
        keras_vit.save_checkpoint(model, path, family)
    return paths


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="*", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.path or make_checkpoints(pathlib.Path(folder))
        runs = {path: [] for path in paths}
        for _ in range(arguments.repeats):  # in turn
            for path in paths:
                runs[path].append(measure(path))
        print("| file | MB | in float32 | s per 100 MB, min | median | memory / file | / float32 |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for path, results in runs.items():
            size = path.stat().st_size
            seconds = sorted(result["seconds"] * 1e8 / size for result in results)
            memory = max(result["bytes"] for result in results)
            weights = results[0]["weights"]
            print(
                f"| {path.name} | {size / 1e6:.1f} | {weights / 1e6:.1f} | {seconds[0]:.2f} | "
                f"{seconds[len(seconds) // 2]:.2f} | {memory / size:.2f} | "
                f"{memory / weights:.2f} |"
            )


if __name__ == "__main__":
    main()
