"""The one way in which the benchmarks measure: contenders in turns, and a JSON of what they took.

A contender is a process of its own, in an environment of its own. It builds, then sleeps at its
standard input until its turn, so that one computes at a time; a round is a turn of each, so that a
disturbance of the machine meets them alike. Tables and pictures are made of the JSON alone.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import pathlib
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time

from environments import Missing, last_line, python_of

FOLDER = pathlib.Path(__file__).parent / "results"
QUICK = "quick"  # the folder in it for what --quick gives
LONGEST_ANSWER = 900  # seconds: who takes longer hangs
# Variables of a process that is to give back what it frees; see `memory`.
GIVING_BACK = {"TF_ENABLE_ONEDNN_OPTS": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is measured.

    Attributes:
        build: A function of a file in this folder. `build(**options)` gives `(make, weights)`:
            `make(case)` gives `run(calls)`, which computes so many times and returns None, or the
            seconds that it took by its own clock; `weights` is their number, or None.
        environment: Where it runs: a key of `environments.PACKAGES`, or None for this Python.
        packages: Those whose versions belong to the result.
        options: What JSON can hold.
        variables: Environment variables of the process.
        timed: Whether it has turns; if not, it starts, warms up and tells its memory alone.
    """

    build: object
    environment: str | None = None
    packages: tuple = ()
    options: dict = dataclasses.field(default_factory=dict)
    variables: dict = dataclasses.field(default_factory=dict)
    timed: bool = True


class Process:
    """A contender at work. Once anything ends it, `missing` says why and it answers None."""

    def __init__(self, contender):
        self.contender = contender
        self.missing = None
        self.facts = None  # its weights and versions
        self._process = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._python = python_of(contender.environment)
        except Missing as error:
            self.missing = str(error)

    def start(self):
        """Starts it and waits until it has built."""
        if self.missing is not None:
            return
        contender = self.contender
        what = (contender.build.__name__, json.dumps(contender.options))
        command = [self._python, __file__, inspect.getfile(contender.build), *what]
        command += contender.packages
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "KERAS_BACKEND": "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **contender.variables,
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        try:
            self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        except OSError as error:  # an environment whose Python has gone
            self.missing = str(error)
            return
        self.facts = self._answer()

    def ask(self, **message):
        """Sends a message and waits for the answer."""
        if self.missing is None:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(message), file=self._process.stdin, flush=True)
            return self._answer()

    def _answer(self):
        answers, _, _ = select.select([self._process.stdout], [], [], LONGEST_ANSWER)
        if not answers:
            self.missing = f"no answer in {LONGEST_ANSWER} s"
            self._process.kill()
            return None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        self.missing = f"signal {-code}" if code < 0 else last_line(self._log.read())[:300]

    def close(self):
        """Ends it."""
        self._log.close()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def compare(contenders, cases, *, rounds=5, turn=1.0, least_calls=1):
    """Measures contenders in turns.

    Args:
        contenders: Dictionary name -> `Contender`.
        cases: What `make` takes, one after the other, such as batch sizes.
        rounds: Turns of each contender and case.
        turn: Seconds of a turn, about: so many calls as fit.
        least_calls: Calls of a turn, at least.

    Returns:
        For each case {"case": ..., "contenders": {name: measured}}. `measured` is
        {"missing": why}, or "weights", "versions", "seconds" (of a call, the mean of each turn),
        "resident_bytes" and "peak_bytes" (of the process before the first call and within a later
        one; Linux) and "call_bytes" (what that later one took).
    """
    processes = {name: Process(contender) for name, contender in contenders.items()}
    with contextlib.ExitStack() as stack:
        for process in processes.values():
            stack.callback(process.close)
        print(f"Starting {', '.join(processes)}", flush=True)
        together(Process.start, processes)
        return [measure(processes, case, rounds, turn, least_calls) for case in cases]


def compare_with_memory(contenders, cases, **options):
    """`compare`, and "call_bytes" from a second process of each contender, under `GIVING_BACK`.

    What gives memory back is slower, so that one process cannot tell both. The two start and warm
    up at the same time; the first alone is timed.
    """
    frugal = {
        f"{name}, for its memory": dataclasses.replace(
            one, variables={**one.variables, **GIVING_BACK}, timed=False
        )
        for name, one in contenders.items()
    }
    return [
        {
            "case": case["case"],
            "contenders": {
                name: with_memory(case["contenders"][name], case["contenders"][other])
                for name, other in zip(contenders, frugal, strict=True)
            },
        }
        for case in compare({**contenders, **frugal}, cases, **options)
    ]


def with_memory(entry, other):
    """What was timed in one process, with what a call took in another one."""
    if "missing" in entry or "missing" in other:
        return {"missing": entry.get("missing") or other["missing"]}
    return {**entry, "call_bytes": other["call_bytes"]}


def measure(processes, case, rounds, turn, least_calls):
    """One case of `compare`."""
    print(f"  {case}: warm-up", end="", flush=True)
    estimates = together(lambda process: process.ask(case=case, do="warm up"), processes)
    seconds = {name: [] for name in processes}
    for round_ in range(rounds):
        print(f", {round_ + 1}", end="", flush=True)
        for name, process in processes.items():
            if process.missing is None and process.contender.timed:
                calls = max(least_calls, math.ceil(turn / estimates[name]["seconds"]))
                answer = process.ask(case=case, do="compute", calls=calls)
                seconds[name].append(answer and answer["seconds"])
    memory = together(lambda process: process.ask(case=case, do="memory"), processes)
    print(f" of {rounds} rounds", flush=True)
    measured = {
        name: {"missing": process.missing}
        if process.missing is not None
        else {**process.facts, "seconds": seconds[name], **memory[name]}
        for name, process in processes.items()
    }
    return {"case": case, "contenders": measured}


def together(function, processes):
    """`function` of each process, one on each core: for what is not timed.

    From the last to the first: `torch.compile`, which takes longest, comes last in most benchmarks,
    and would be waited for with the other cores at rest.
    """
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        answers = list(pool.map(function, reversed(processes.values())))
    return dict(zip(processes, reversed(answers), strict=True))


def serve(file, function, options, packages):
    """The process of a contender: answers a line of JSON with a line of JSON."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make, weights = getattr(module, function)(**json.loads(options))
    versions = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps({"weights": weights, "versions": versions}), file=answers)
    case = run = None
    for line in sys.stdin:
        message = json.loads(line)
        if run is None or message["case"] != case:
            run = None  # before the next one takes memory
            case = message["case"]
            run = make(case)
            before = status_bytes("VmRSS")
        print(json.dumps(ACTIONS[message["do"]](run, message, before)), file=answers)


def warm_up(run, message, before):
    """Compiles, and says how long a call takes about."""
    run(1)
    return compute(run, {"calls": 1}, before)


def compute(run, message, before):
    """Seconds per call."""
    start = time.perf_counter()
    seconds = run(message["calls"])
    elapsed = time.perf_counter() - start
    return {"seconds": (elapsed if seconds is None else seconds) / message["calls"]}


def memory(run, message, before):
    """What the process held before the first call, the peak within another one, and what that took.

    With oneDNN, TensorFlow keeps what it has once taken for its tensors, so that another call takes
    nothing; without it, it frees, and malloc returns at once what is larger than a threshold, which
    grows unless it is set: `GIVING_BACK`. What compiling took and gave back does not count. A run
    on a device says by `run.device_bytes()` what was the most that it took there.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    trimmed = status_bytes("VmRSS")
    run(1)
    peak = status_bytes("VmHWM")
    on_device = {"device_bytes": run.device_bytes()} if hasattr(run, "device_bytes") else {}
    taken = None if peak is None else peak - trimmed
    return {"resident_bytes": before, "peak_bytes": peak, "call_bytes": taken, **on_device}


ACTIONS = {"warm up": warm_up, "compute": compute, "memory": memory}


def status_bytes(name):
    """A line of /proc/self/status; None but on Linux."""
    if sys.platform != "linux":
        return None
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def machine():
    """What this runs on."""
    cpu, system, memory = platform.processor(), platform.platform(terse=True), None
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a system without the file
            system = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": cores(),
        "memory_bytes": memory,
        "system": system,
        "python": platform.python_version(),
    }


def result_of(name, quick, **content):
    """A result: what was measured, and what by, when and where."""
    date = datetime.date.today().isoformat()
    return {"benchmark": name, "date": date, "quick": quick, "machine": machine(), **content}


def save(name, quick, **content):
    """Writes results/NAME.json (results/quick/NAME.json), prints its table and draws its picture.

    Unless it is a quick run, also the READMEs, which thus never say something else.
    """
    import report  # here, as it needs keras_vit, which the peers' environments lack

    from keras_vit.files import write_text

    result = result_of(name, quick, **content)
    path = (FOLDER / QUICK if quick else FOLDER) / f"{name}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"\n{report.section(result)}\n{path}", flush=True)
    report.picture(result, path.with_suffix(".png"))
    if not quick:
        report.write_readmes()


def parser(doc):
    """What the command lines of the benchmarks share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it works, in a minute")
    return parser


def markdown(columns, rows):
    """A table, the first column a name and the others numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def described(result):
    """One line: where and when a result was measured."""
    machine = result["machine"]
    gigabytes = f", {machine['memory_bytes'] / 2**30:.0f} GB" if machine["memory_bytes"] else ""
    quick = " A quick run: no figures to go by." if result["quick"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{gigabytes}, {machine['system']}, "
        f"Python {machine['python']}, {result['date']}.{quick}\n"
    )


def versions_line(versions):
    """The packages that a result was measured with."""
    return ", ".join(" ".join(item) for item in sorted(versions.items())) + ".\n"


def draw(path, *rows, width=5.0, height=3.4):
    """Writes a PNG of rows of panels: functions that draw on axes."""
    import matplotlib.figure

    columns = len(rows[0])
    figure = matplotlib.figure.Figure((width * columns, height * len(rows)), layout="constrained")
    for row, panels in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axes, panel in zip(row, panels, strict=True):
            panel(axes)
    figure.savefig(path, dpi=80)


def ratio(ours, theirs, statistic=min):
    """How many times as fast we are: their seconds over ours."""
    return statistic(theirs["seconds"]) / statistic(ours["seconds"])


def exponent(x, y):
    """p of the power law y = c x^p that fits best, by least squares of the logarithms."""
    logarithms = [math.log(value) for value in x]
    fit = statistics.linear_regression(logarithms, [math.log(value) for value in y])
    return fit.slope


if __name__ == "__main__":
    serve(*sys.argv[1:4], sys.argv[4:])
