"""What `import keras_vit` adds to `import keras`, and how soon `keras-vit --help` answers.

    python benchmarks/startup.py

Fresh processes, the commands in turns; minimum and median in seconds.
"""

import pathlib
import statistics
import subprocess
import sys
import time

ROUNDS = 10
COMMANDS = {
    "import keras": [sys.executable, "-c", "import keras"],
    "import keras, keras_vit": [sys.executable, "-c", "import keras, keras_vit"],
    "keras-vit --help": [str(pathlib.Path(sys.executable).with_name("keras-vit")), "--help"],
}


def main():
    seconds = {name: [] for name in COMMANDS}
    for round_ in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_:  # the first warms the file cache
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{name:25} min {min(values):.2f}  median {statistics.median(values):.2f}")
    added = [
        both - alone
        for both, alone in zip(
            seconds["import keras, keras_vit"], seconds["import keras"], strict=True
        )
    ]
    print(f"{'added by keras_vit':25} min {min(added):.2f}  median {statistics.median(added):.2f}")


if __name__ == "__main__":
    main()
