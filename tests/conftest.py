"""What the tests of training, evaluation, export and the command share."""

import contextlib
import ctypes
import gc
import io
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# On JAX, compiling the hundreds of toy models takes longer than all that is computed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes that share the tests have all cores at work; with threads they wait in turns.
    for threads in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(threads, "1")

import filelock
import pytest

LOGICAL_CPUS = 4

# The files of minutes, first, so that the processes that share them end together; `digits_run` is
# trained by the first, while the others have files that do without it.
LONGEST = (
    "test_training",
    "test_resume",
    "test_distributed",
    "test_workers",
    "test_weights",
    "test_notebooks",
    "test_saved_model",
)


def pytest_configure(config):
    """Before TensorFlow starts: replicas for the tests of distributed training."""
    if config.getoption("numprocesses", None):
        return  # the tests are run by other processes: this one does without Keras
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * LOGICAL_CPUS,
        )


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    """What is imported by now stays: no garbage collection of an export need look through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # new objects that make one due; tracing makes them by the million


@pytest.fixture(scope="module", autouse=True)
def memory_back():
    """What a file of tests leaves free is given back, of which gigabytes would add up.

    What it does not is looked through no more by the garbage collections of later files.
    """
    yield
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """What `keras-vit train` makes of digits by default. Tests must not change the folder.

    The first process of the tests that needs it trains; the others wait.
    """
    from keras_vit.training import load_run, train

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "digits_run"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            # Not straight to its place, where a failure would leave half of it for the others.
            part = train("digits", folder.with_name("digits_run.part")).folder
            part.rename(folder)
    return load_run(folder)


@pytest.fixture(scope="session", autouse=True)
def convert_here():
    """Exports are converted in this process: a new one imports TensorFlow and Keras for seconds.

    Yields:
        Context in which a process of its own converts, as outside of the tests.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        yield
        return
    from keras_vit.export import convert, tflite

    def run_converter(folder, output, mode):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.chdir(folder)
            patch.setattr("sys.argv", ["convert", str(output)])
            convert.main()

    in_own_process = tflite._run_converter

    @contextlib.contextmanager
    def own_process():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tflite, "_run_converter", in_own_process)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tflite, "_run_converter", run_converter)
        yield own_process


@pytest.fixture
def own_process(convert_here):
    """Exports are converted in a process each, as outside of the tests."""
    with convert_here():
        yield
