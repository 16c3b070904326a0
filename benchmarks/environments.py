"""A virtual environment for each peer, made when it is first needed and kept.

    python benchmarks/environments.py [--fresh] [NAME ...]     # all but litert-torch by default

They lie in benchmarks/.environments/, some 2 GB each with TensorFlow and 5 GB with PyTorch.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import shutil
import subprocess
import sys
import venv

FOLDER = pathlib.Path(__file__).parent / ".environments"
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
TENSORFLOW = ("tensorflow==2.21.*", "keras==3.15.*")
PACKAGES = {  # name -> what pip installs
    "keras-hub": (*TENSORFLOW, "keras-hub==0.32.0"),
    # It imports OpenCV and does not declare it.
    "vit-keras": (*TENSORFLOW, "vit-keras==0.2.0", "opencv-python-headless==5.0.0.93"),
    "timm": (*TORCH, "timm==1.0.31"),
    "vit-pytorch": (*TORCH, "vit-pytorch==1.26.11"),
    "litert-torch": ("litert-torch==0.10.0", "timm==1.0.31"),  # which chooses its own PyTorch
}
OPTIONAL = ("litert-torch",)
AT_ONCE = 2  # pip unpacks on one core
READY = "ready.txt"  # holds what was asked for, so that a changed pin makes it anew


class Missing(RuntimeError):
    """Why a contender cannot be measured."""


def python_of(name, make=True):
    """The Python of an environment, which is made if it is not there.

    Args:
        name: A key of `PACKAGES`, or None: the Python that runs this.
        make: Whether it may be made; if not, it has to be there.

    Raises:
        Missing: It cannot be made; the message is what venv, or the last line of what pip says.
    """
    if name is None:
        return pathlib.Path(sys.executable)
    folder = FOLDER / name
    if not is_ready(name):
        if not make:
            raise Missing(f"benchmarks/.environments/{name} is not there")
        import filelock  # here: the peers' environments import this file, and not all have it

        FOLDER.mkdir(exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):  # another benchmark may make it
            if not is_ready(name) and (reason := why_not(name)):
                raise Missing(reason)
    return folder / "bin" / "python"


def is_ready(name):
    """Whether an environment is there, with the packages that are asked for now."""
    ready = FOLDER / name / READY
    return ready.exists() and ready.read_text() == "\n".join(PACKAGES[name])


@functools.cache
def why_not(name):
    """Makes an environment; why it cannot be made, or None. A process tries once."""
    folder = FOLDER / name
    print(f"Making benchmarks/.environments/{name}: {', '.join(PACKAGES[name])}", flush=True)
    try:
        venv.create(folder, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"venv: {error}"
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES[name]]
    process = subprocess.run(install, capture_output=True, text=True)
    if process.returncode:
        return last_line(process.stderr)
    (folder / READY).write_text("\n".join(PACKAGES[name]))
    return None


def last_line(text):
    """What a program said last, which is mostly why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def describe(name):
    """Where an environment's Python is, once it is made, or why it is missing."""
    try:
        return f"{name}: {python_of(name)}"
    except Missing as error:
        return f"{name} is missing: {error}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    standard = [name for name in PACKAGES if name not in OPTIONAL]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGES))
    parser.add_argument("--fresh", action="store_true", help="make them anew")
    arguments = parser.parse_args()
    names = list(dict.fromkeys(arguments.names or standard))
    for name in names:
        if name not in PACKAGES:
            parser.error(f"NAME is one of {', '.join(PACKAGES)}. Received: {name}.")
    for name in names if arguments.fresh else ():
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for line in pool.map(describe, names):
            print(line, flush=True)


if __name__ == "__main__":
    main()
