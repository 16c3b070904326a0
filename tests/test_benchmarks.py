"""The harness of the benchmarks, with contenders that compute nothing; what READMEs claim."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The folder of the benchmarks on the path, as when one of them runs."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def fake(seconds, weights=None, fails_at=None):
    """A contender that says it took `seconds` a call."""

    def make(case):
        if case == fails_at:
            raise ValueError(f"no case {case}")
        return lambda calls: calls * seconds

    return make, weights


def noting(file, fails_at=None):
    """Writes down each case that it computes."""

    def make(case):
        def run(calls):
            if case == fails_at:
                raise ValueError(f"no case {case}")
            with open(file, "a") as log:
                print(case, file=log)

        return run

    return make, None


def sleeping(seconds):
    return lambda case: lambda calls: time.sleep(seconds * calls), None


def hungry(megabytes):
    """Takes memory for the time of a call."""
    return lambda case: lambda calls: bytearray(b"x") * (megabytes * 2**20) and None, None


def result_of(**content):
    """What a table is made of."""
    machine = {"cpu": "C", "cores": 2, "memory_bytes": None, "system": "S", "python": "3"}
    return {"date": "D", "quick": False, "machine": machine, **content}


def keeps_unless_told(megabytes):
    """As TensorFlow with oneDNN: keeps what it has taken, and is slower if it may not."""
    import os

    gives_back = os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0"
    kept = None

    def run(calls):
        nonlocal kept
        kept = kept or bytearray(b"x") * (megabytes * 2**20)
        if gives_back:
            kept = None
        return calls * (0.5 if gives_back else 0.25)

    return lambda case: run, None


def compare(contenders, cases, **options):
    import harness

    return harness.compare(contenders, cases, **options)


def contender(build, environment=None, packages=(), **options):
    from harness import Contender

    return Contender(build, environment, packages, options)


def test_contenders_are_measured_in_their_processes():
    [first, second] = compare(
        {
            "ours": contender(fake, seconds=0.25, weights=7, packages=("numpy",)),
            "theirs": contender(fake, seconds=0.5),
        },
        [3, {"batch": 5}],
        rounds=3,
    )
    assert (first["case"], second["case"]) == (3, {"batch": 5})
    ours, theirs = first["contenders"].values()
    assert ours["seconds"] == [0.25] * 3
    assert theirs["seconds"] == [0.5] * 3
    assert (ours["weights"], theirs["weights"]) == (7, None)
    assert set(ours["versions"]) == {"numpy"}
    assert json.loads(json.dumps(first)) == first


def test_the_clock_of_the_harness_is_per_call():
    [case] = compare({"a": contender(sleeping, seconds=0.01)}, [None], rounds=1, least_calls=4)
    [seconds] = case["contenders"]["a"]["seconds"]
    assert seconds >= 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    [case] = compare({"a": contender(hungry, megabytes=200)}, [None], rounds=1)
    entry = case["contenders"]["a"]
    added = (entry["peak_bytes"] - entry["resident_bytes"]) / 2**20
    assert added == pytest.approx(200, abs=20)  # Linux counts pages in lots
    assert entry["call_bytes"] / 2**20 == pytest.approx(200, abs=20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_of_a_process_that_gives_back():
    import harness

    contenders = {"a": contender(keeps_unless_told, megabytes=100)}
    [case] = compare(contenders, [None], rounds=1)
    [with_memory] = harness.compare_with_memory(contenders, [None], rounds=2)
    assert case["contenders"]["a"]["call_bytes"] / 2**20 < 20
    entry = with_memory["contenders"]["a"]
    assert entry["call_bytes"] / 2**20 == pytest.approx(100, abs=20)
    assert entry["seconds"] == [0.25] * 2  # of the process as users have it


def test_time_and_memory_of_two_processes():
    from harness import with_memory

    timed, frugal = {"seconds": [1], "call_bytes": 1}, {"seconds": [9], "call_bytes": 7}
    assert with_memory(timed, frugal) == {"seconds": [1], "call_bytes": 7}
    assert with_memory({"missing": "A"}, frugal) == {"missing": "A"}
    assert with_memory(timed, {"missing": "B"}) == {"missing": "B"}


def test_who_fails_is_missing_and_the_others_go_on():
    first, second = compare(
        {
            "a": contender(fake, seconds=0.1),
            "fails later": contender(fake, seconds=0.1, fails_at=2),
            "cannot be built": contender(fake),
            "is not installed": contender(fake, packages=("no-such-package",), seconds=0.1),
        },
        [1, 2],
        rounds=1,
    )
    missing = {
        name: entry["missing"] for name, entry in second["contenders"].items() if "missing" in entry
    }
    assert "seconds" in first["contenders"]["fails later"]
    assert "seconds" in second["contenders"]["a"]
    assert missing.keys() == {"fails later", "cannot be built", "is not installed"}
    assert missing["fails later"] == "ValueError: no case 2"
    assert "missing 1 required positional argument: 'seconds'" in missing["cannot be built"]
    assert "no-such-package" in missing["is not installed"]


def test_an_environment_that_cannot_be_made_is_missing(tmp_path, monkeypatch):
    import environments

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setitem(environments.PACKAGES, "impossible", ("./no/such/folder",))
    [case] = compare({"a": contender(fake, "impossible", seconds=1)}, [None], rounds=1)
    assert "no/such/folder" in case["contenders"]["a"]["missing"]
    with pytest.raises(environments.Missing, match="is not there"):
        environments.python_of("impossible", make=False)

    tries = []

    def create(*arguments, **options):
        tries.append(arguments)
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(environments.venv, "create", create)
    environments.why_not.cache_clear()
    for _ in range(2):
        with pytest.raises(environments.Missing, match="venv: Command 'ensurepip' returned non-"):
            environments.python_of("impossible")
    assert len(tries) == 1  # in vain: not for each contender


def test_an_environment_whose_python_has_gone_is_missing(tmp_path, monkeypatch):
    import environments

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setitem(environments.PACKAGES, "moved", ("a==1",))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / environments.READY).write_text("a==1")
    [case] = compare({"a": contender(fake, "moved", seconds=1)}, [None], rounds=1)
    assert "No such file or directory" in case["contenders"]["a"]["missing"]


def test_who_hangs_is_missing(monkeypatch):
    import harness

    process = harness.Process(contender(sleeping, seconds=60))
    process.start()
    monkeypatch.setattr(harness, "LONGEST_ANSWER", 0.1)
    assert process.ask(case=None, do="warm up") is None
    assert process.missing == "no answer in 0.1 s"
    assert process.ask(case=None, do="compute", calls=1) is None
    process.close()


def test_contenders_need_no_package_of_ours():
    """The environment of a peer has what the peer needs, and NumPy."""
    command = [sys.executable, "-S", "-c", "import harness"]
    subprocess.run(command, cwd=ROOT / "benchmarks", check=True)


def test_ratios_and_exponents():
    import statistics

    import harness

    ours, theirs = {"seconds": [2.0, 4.0, 3.0]}, {"seconds": [5.0, 9.0, 6.0]}
    assert harness.ratio(ours, theirs) == 2.5
    assert harness.ratio(ours, theirs, statistics.median) == 2.0
    x = [1, 2, 5, 11]
    assert harness.exponent(x, [3 * value**1.7 for value in x]) == pytest.approx(1.7)


def test_multiplications_are_those_of_the_readme():
    """Ti/16 at 224 px has 1.25 GMACs: `tests/test_readme.py` counts them anew."""
    import models

    assert f"{models.multiplications(models.SIZES['Ti/16'], whole=True) / 1e9:.2f}" == "1.25"
    # Two tokens of width 3, one block: 2 * 2 * 9 of keys and values, then the class token's
    # 2 * 9 of q and output, 2 * 3 * 5 of the MLP, 2 * 2 * 3 of attention; 1 * 3 * 49 * 3; the head.
    last, others = 36 + 18 + 30 + 12, 441 + 3000
    assert models.multiplications((3, 1, 1, 5), side=7, patch=7) == last + others


def test_file_of_the_products_multiplies_what_is_counted(tmp_path, monkeypatch):
    import models
    import tflite
    from ai_edge_litert.interpreter import Interpreter

    from keras_vit.export.benchmark import describe_graph

    monkeypatch.setitem(tflite.SIZES, "small", (24, 3, 40, 56, None))  # 16 patches
    path = tmp_path / "products.tflite"
    tflite.products("small", "int8", path)
    interpreter = Interpreter(str(path))
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    counted = 0
    for operator in interpreter._get_ops_details():
        if operator["op_name"] in ("FULLY_CONNECTED", "BATCH_MATMUL"):
            a, b, *_ = (details[index] for index in operator["inputs"] if index >= 0)
            [output] = (details[index] for index in operator["outputs"])
            assert a["dtype"] == b["dtype"] == output["dtype"] == np.int8
            counted += int(np.prod(output["shape"])) * int(a["shape"][-1])
    assert counted == models.multiplications((24, 12, 3, 40), patch=56)
    facts = describe_graph(path)
    assert (facts.partitions, facts.outside) == (1, {})


def test_growth_table_sets_measured_beside_theory(tmp_path):
    """Time as the square root of the multiplications, memory as theory: so says the table."""
    import growth

    cases = [{**growth.BASE, "batch": batch} for batch in (2, 4, 16)]
    points = [
        {
            **case,
            "multiplications": 10**6 * case["batch"],
            "kept_bytes": growth.kept(case, "forward"),
            "seconds": [1e-3 * case["batch"] ** 0.5],
            "call_bytes": growth.kept(case, "forward") ** 2,
        }
        for case in cases
    ]
    points.append({**growth.BASE, "batch": 64, "missing": "no memory"})
    series = {"kind": "forward", "grows": "batch", "points": points}
    result = result_of(series=[series], micro_batches=[series])
    text = growth.table(result)
    assert "| forward, batch 2 to 16 | 0.50 | 1.00 | 2.00 | 1.00 |" in text
    points[1]["call_bytes"] = None  # as on a system that is not Linux
    assert "| forward, batch 2 to 16 | 0.50 | 1.00 |  | 1.00 |" in growth.table(result)
    growth.plot(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").exists()


def test_growth_names_a_series_without_points(tmp_path):
    import growth

    measured = {"seconds": [1.0], "call_bytes": 7, "kept_bytes": 5, "multiplications": 3}
    failed = {"missing": "no memory"}
    cases = [{**growth.BASE, "batch": batch} for batch in (1, 2)]
    for entries in ([measured, failed], [failed, failed]):
        points = [{**case, **entry} for case, entry in zip(cases, entries, strict=True)]
        series = {"kind": "forward", "grows": "batch", "points": points}
        result = result_of(series=[series], micro_batches=[series])
        text = growth.table(result)
        assert "forward, batch is missing: no memory" in text
        all_failed = measured not in entries
        assert ("Micro-batches of 1 to 2 images are missing: no memory" in text) == all_failed
        growth.plot(result, tmp_path / "growth.png")


def test_contenders_on_a_card_are_compiled_first(tmp_path, capsys):
    import gpu

    ours, theirs = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    chosen = {
        ("forward", "ours"): contender(noting, file=str(ours)),
        ("forward", "theirs"): contender(noting, file=str(theirs), fails_at=5),
    }
    gpu.compile_all(chosen, [3, 5, 7])
    assert sorted(set(ours.read_text().split())) == ["3", "5", "7"]
    assert set(theirs.read_text().split()) == {"3"}
    assert capsys.readouterr().out == "forward theirs: ValueError: no case 5\n"


def test_a_picture_of_a_run_on_a_card_that_was_stopped(tmp_path):
    import gpu

    entry = {"seconds": [0.5, 0.25], "device_bytes": 2 * 10**9}
    cases = [{"case": batch, "contenders": {"keras-vit": entry}} for batch in (8, 32)]
    multiplications = {"keras-vit": 10**9}
    groups = [
        {"variant": variant, "kind": kind, "cases": cases, "multiplications": multiplications}
        for variant, kind in (("S/16", "forward"), ("S/16", "training"), ("B/16", "forward"))
    ]
    result = result_of(card="a card", peak_tflops=1.0, groups=groups)
    gpu.plot(result, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").exists()
    text = gpu.table(result)
    assert "| S/16, forward | 8 | keras-vit | 32, 21 | 6.4% | 2.0 |" in text  # 32 x 2e9 / 1e12
    assert "| S/16, training | 32 | keras-vit | 128, 85 | 76.8% | 2.0 |" in text


def test_results_round_trip(tmp_path, monkeypatch, capsys):
    import harness

    monkeypatch.setattr(harness, "FOLDER", tmp_path)
    values = list(range(1_000_000, 1_000_100))
    harness.save("steady", True, resident_bytes=values)
    result = json.loads((tmp_path / "quick" / "steady.json").read_text())
    assert result["resident_bytes"] == values
    assert result["machine"]["cores"] == harness.cores()
    assert (tmp_path / "quick" / "steady.png").stat().st_size > 0
    assert "A quick run: no figures to go by." in capsys.readouterr().out


def test_a_group_in_bfloat16_computes_in_it():
    import inspect

    import speed

    groups = [(kind, few) for _, kind, _, _, few in (*speed.GROUPS, *speed.QUICK)]
    groups = [few for kind, few in groups if kind.endswith(speed.BFLOAT16)]
    assert len(groups) == 2
    for few in groups:
        chosen = speed.contenders("Ti/16", "training")
        chosen = speed.in_bfloat16({name: chosen[name] for name in few})
        in_float32 = chosen.pop(f"{speed.OURS}, float32")
        assert in_float32 == speed.contenders("Ti/16", "training")[speed.OURS]
        for contender in chosen.values():
            assert contender.options["mixed"] is True
            inspect.signature(contender.build).bind(**contender.options)  # each takes it


def test_table_of_a_missing_contender():
    import speed

    entry = {"seconds": [0.5, 1.0], "weights": 7, "peak_bytes": 3e6, "versions": {"keras": "3"}}
    theirs = {**entry, "seconds": [1.0, 1.5], "peak_bytes": 6e6}
    entries = {speed.OURS: entry, "KerasHub": theirs, "timm": {"missing": "no wheel"}}
    entries["timm, compiled"] = entries["timm"]
    group = {"variant": "Ti/16", "kind": "training", "cases": [{"case": 32, "contenders": entries}]}
    result = result_of(groups=[group])
    text = speed.table(result)
    assert "| KerasHub | 7 | 1000, 1250 | 2.00, 1.67 | 6 |" in text
    goal = "| Ti/16, training, batch 32: speed / KerasHub | >= 1.25 |"
    assert f"{goal} 2.000, 1.667 | kept |  |" in text
    assert "| Ti/16, training, batch 32: memory / KerasHub | <= 1.0 | 0.500 | kept |  |" in text
    entries[speed.PRODUCTS] = {**entry, "seconds": [0.25, 0.5]}
    entries["KerasHub, XLA"] = {**theirs, "seconds": [0.7, 0.8], "peak_bytes": None}
    goals = speed.goals_table(result)
    assert f"{goal} 1.400, 1.000 | kept by the minimum alone | 2.80, 2.00 |" in goals
    assert "memory / KerasHub" not in goals
    entries["KerasHub, XLA"]["seconds"] = [0.6]
    assert f"{goal} 1.200, 0.800 | missed | 2.40, 1.60 |" in speed.goals_table(result)
    del entries["KerasHub, XLA"], entries[speed.PRODUCTS]
    assert "timm (Ti/16, training, batch 32) is missing: no wheel" in text
    assert "timm, compiled (Ti/16, training, batch 32) is missing: no wheel" in text
    assert "| Ti/16, training, batch 32 | 64.0 | 2.00 |  |  | missing |  |" in speed.claims(result)
    assert speed.same_model(entries) == entries
    other = speed.same_model({**entries, "KerasHub": {**theirs, "weights": 8}})
    assert other == {**entries, "KerasHub": {"missing": "another model: 8 weights"}}


def test_tables_without_us():
    import speed

    theirs = {"seconds": [1.0], "weights": 7, "peak_bytes": 6e6, "versions": {"keras": "3"}}
    entries = {speed.OURS: {"missing": "no memory"}, "KerasHub": theirs}
    group = {"variant": "Ti/16", "kind": "training", "cases": [{"case": 32, "contenders": entries}]}
    result = result_of(groups=[group])
    text = speed.table(result)
    assert "| KerasHub | 7 | 1000, 1000 |  | 6 |" in text
    assert "keras-vit (Ti/16, training, batch 32) is missing: no memory" in text
    assert "| Ti/16, training, batch 32 | missing |  |  |  |  |  |" in speed.claims(result)


def test_memory_of_a_step_is_a_line_through_two_batches():
    import speed

    def group(batch, peak):
        entries = {
            "KerasHub": {"peak_bytes": peak, "resident_bytes": 3e8},
            "timm": {"missing": "no wheel"},
        }
        cases = [{"case": batch, "contenders": entries}]
        return {"variant": "Ti/16", "kind": "training", "cases": cases}

    groups = [group(8, 900e6), group(32, 2100e6)]
    text = speed.memory_table({"groups": groups})
    assert "| Ti/16: KerasHub | 300 | 500 | 50 |" in text
    assert "timm" not in text
    assert speed.memory_table({"groups": groups[:1]}) == ""


def test_loading_table():
    import loading

    entry = {"file_bytes": 200_000_000, "seconds": [3.0, 2.0, 4.0], "versions": {"keras": "3"}}
    entries = {"ours": {**entry, "call_bytes": 300_000_000}}
    entries["theirs"] = {"file_bytes": 5_000_000, "missing": "no wheel"}
    result = result_of(contenders=entries)
    text = loading.table(result)
    assert "| ours | 200.0 | 2.00, 3.00 | 1.00 | 1.50 |" in text
    assert "| theirs | 5.0 | missing: no wheel |  |  |" in text


@pytest.mark.parametrize("folder", [ROOT, ROOT / "benchmarks"], ids=["project", "benchmarks"])
def test_readmes_are_what_the_results_say(folder):
    """No figure between the markers is typed: `python benchmarks/report.py` writes them."""
    import report

    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "<!-- begin " in text
    assert report.filled(text, folder) == text


def test_every_result_is_shown():
    import report

    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in report.RESULTS.glob("*.json"):
        assert f"<!-- begin {path.stem} -->" in text
        assert not json.loads(path.read_text())["quick"]


def test_every_benchmark_says_how_to_run_it():
    for path in (ROOT / "benchmarks").glob("*.py"):
        if path.stem not in ("harness", "models"):
            doc = path.read_text(encoding="utf-8").split('"""')[1]
            assert f"python benchmarks/{path.name}" in doc


@pytest.mark.parametrize("classes", [(0, 1), (1, 3), (0, 2, 3)])
def test_linear_head_of_few_classes(classes):
    """Logits of every class of four, whichever of them have images; those of scikit-learn."""
    import keras
    from export_accuracy import with_linear_head

    rng = np.random.default_rng(0)
    labels = rng.choice(classes, 80)
    images = rng.normal(0, 1, (80, 3, 2, 5)) + np.eye(5)[labels][:, None, None]
    inputs = keras.Input((3, 2, 5))
    backbone = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    model = with_linear_head(backbone, images, labels, 4)
    found = np.asarray(keras.ops.softmax(model.predict(images, verbose=0)))
    features = StandardScaler().fit_transform(images.mean(axis=(1, 2)))
    fitted = LogisticRegression(C=0.01, max_iter=300).fit(features, labels)
    expected = np.zeros((80, 4))
    expected[:, classes] = fitted.predict_proba(features)
    np.testing.assert_allclose(found, expected, atol=1e-3)
