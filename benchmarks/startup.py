"""What `import keras_vit` adds to `import keras`, and how soon `keras-vit --help` answers.

    python benchmarks/startup.py

Fresh processes, the commands in turns.
"""

import pathlib
import statistics
import subprocess
import sys
import time

from harness import described, markdown, parser, save

KERAS, BOTH = "import keras", "import keras, keras_vit"
COMMANDS = {
    KERAS: [sys.executable, "-c", KERAS],
    BOTH: [sys.executable, "-c", BOTH],
    "keras-vit --help": [str(pathlib.Path(sys.executable).with_name("keras-vit")), "--help"],
}


def table(result):
    seconds = result["seconds"]
    rows = [
        (f"`{name}`", f"{min(values):.2f}", f"{statistics.median(values):.2f}")
        for name, values in seconds.items()
    ]
    added = [both - keras for both, keras in zip(seconds[BOTH], seconds[KERAS], strict=True)]
    rows.append(("keras_vit adds, round by round", "", f"{statistics.median(added):.2f}"))
    return markdown(("", "min, s", "median, s"), rows) + "\n" + described(result)


def main():
    quick = parser(__doc__).parse_args().quick
    seconds = {name: [] for name in COMMANDS}
    for round_ in range(1 if quick else 6):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_ or quick:  # the first warms the file cache
                seconds[name].append(time.perf_counter() - start)
    save("startup", quick, seconds=seconds)


if __name__ == "__main__":
    main()
