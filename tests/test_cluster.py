"""Finding the workers in environments as launchers make them, the meeting, and the strategies."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import tensorflow as tf

from keras_vit.files import write_json
from keras_vit.training import cluster as module
from keras_vit.training.cluster import (
    Cluster,
    build_strategy,
    expand_hosts,
    meet,
    resolve_cluster,
)

DOCS = pathlib.Path(__file__).parents[1] / "docs"

TF_CONFIG = {
    "cluster": {"worker": ["10.0.0.5:2222", "10.0.0.9:2223", "w2.vit:2224"]},
    "task": {"type": "worker", "index": 2},
}

# A task of `srun -N 2 -n 4` (Open MPI's users' list, "SLURM environment variables at runtime"),
# with the variables that newer versions add.
SRUN = {
    "SLURM_JOB_ID": "47225",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
# The script of `sbatch -N 2 -n 8` on another cluster: Slurm sets PROCID 0 there as well.
SBATCH = {
    "SLURM_JOB_ID": "33522533",
    "SLURM_JOB_NODELIST": "borgo[086,140]",
    "SLURM_NODELIST": "borgo[086,140]",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_NNODES": "2",
    "SLURM_GTIDS": "0",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
# The shell that `salloc` opens on the first node is a step of one task, of an allocation for 8.
SALLOC = {
    "SLURM_JOB_ID": "754197",
    "SLURM_JOB_NODELIST": "GPU71E4",
    "SLURM_TASKS_PER_NODE": "8",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "GPU71E4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "HOSTNAME": "my-vit-2",
    "JOB_COMPLETION_INDEX": "2",
    "WORLD_SIZE": "3",
    "SERVICE_NAME": "peers",
}
TORCHRUN = {
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "0",
    "TORCHELASTIC_RUN_ID": "none",
}


def free_ports(count):
    """The first of `count` free ports in a row."""
    for first in range(20011 + os.getpid() % 5000, 32000, count):
        try:
            for port in range(first, first + count):
                socket.create_server(("", port)).close()
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


# What the environment says


def test_tf_config():
    cluster = resolve_cluster({"TF_CONFIG": json.dumps(TF_CONFIG)})
    workers = ("10.0.0.5:2222", "10.0.0.9:2223", "w2.vit:2224")
    assert cluster == Cluster(workers, 2, "TF_CONFIG")
    assert cluster.tf_config() == TF_CONFIG
    assert not cluster.is_chief


@pytest.mark.parametrize(("kind", "index", "expected"), [("chief", 0, 0), ("worker", "1", 2)])
def test_tf_config_with_a_chief(kind, index, expected):
    jobs = {"worker": ["a:1", "b:2"], "chief": ["c:3"]}
    config = {"cluster": jobs, "task": {"type": kind, "index": index}}
    cluster = resolve_cluster({"TF_CONFIG": json.dumps(config)})
    assert cluster == Cluster(("c:3", "a:1", "b:2"), expected, "TF_CONFIG")
    assert cluster.is_chief == (kind == "chief")
    assert cluster.tf_config() == {
        "cluster": {"worker": ["c:3", "a:1", "b:2"]},
        "task": {"type": "worker", "index": expected},
    }


def test_srun():
    # 12000 + 16 * (47225 % 1000) = 15600
    workers = ("node1:15600", "node1:15601", "node2:15600", "node2:15601")
    assert resolve_cluster(SRUN) == Cluster(workers, 3, "Slurm")


def test_srun_with_uneven_nodes_and_cyclic_ranks():
    """The place on the node counts, not the rank, which another distribution may give."""
    environ = SRUN | {
        "SLURM_STEP_NODELIST": "a,gpu-[09-10]-ib,c",
        "SLURM_STEP_TASKS_PER_NODE": "1,2(x2),3",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_NODEID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_PROCID": "2",
        "MASTER_PORT": "7000",
    }
    ports = {"a": [7000], "gpu-09-ib": [7000, 7001], "gpu-10-ib": [7000, 7001]}
    ports["c"] = [7000, 7001, 7002]
    workers = tuple(f"{host}:{port}" for host in ports for port in ports[host])
    assert resolve_cluster(environ) == Cluster(workers, 3, "Slurm")


def test_jobs_and_steps_on_one_node_have_ports_of_their_own():
    def ports(**ids):
        cluster = resolve_cluster(SRUN | {"SLURM_STEP_NODELIST": "node[1,2]"} | ids)
        return {worker.split(":")[1] for worker in cluster.workers}

    sets = [
        ports(SLURM_JOB_ID=job, SLURM_STEP_ID=step)
        for job in ("47225", "47226", "47227")
        for step in ("0", "1", "2")
    ]
    assert len(set.union(*sets)) == 9 * 2


def test_pod_of_an_indexed_job():
    workers = ("my-vit-0.peers:12000", "my-vit-1.peers:12000", "my-vit-2.peers:12000")
    assert resolve_cluster(POD) == Cluster(workers, 2, "Kubernetes")
    assert resolve_cluster(POD | {"MASTER_PORT": "99"}).workers[1] == "my-vit-1.peers:99"


def test_torchrun_of_one_process():
    assert resolve_cluster(TORCHRUN) == Cluster(("node1:29502",), 0, "MASTER_ADDR")
    several = resolve_cluster(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"})
    assert several.gpu == 0


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"TF_CONFIG": ""},
        {"TF_CONFIG": "{}"},
        {"TF_CONFIG": '{"environment": "cloud"}'},
        SBATCH,
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": "my-vit-2-x7k2p"},
        {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "sweep-2"},  # pods that train on their own
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
    ],
)
def test_no_cluster(environ):
    assert resolve_cluster(environ) is None


def test_an_interactive_shell_is_one_worker():
    cluster = resolve_cluster(SALLOC)
    assert [worker.split(":")[0] for worker in cluster.workers] == ["GPU71E4"]
    assert build_strategy("auto", cluster) is None


def test_order():
    everything = {"TF_CONFIG": json.dumps(TF_CONFIG)} | SRUN | POD
    sources = []
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX"):
        sources.append(resolve_cluster(everything).source)
        del everything[name]
    assert sources == ["TF_CONFIG", "Slurm", "Kubernetes"]
    for outer in (SRUN, POD):  # torchrun, started by one of these
        assert resolve_cluster(outer | TORCHRUN).source == "MASTER_ADDR"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"TF_CONFIG": "{'cluster'"},
            r"TF_CONFIG must be JSON: .*Received: TF_CONFIG=\"{'cluster'",
        ),
        ({"TF_CONFIG": "[3]"}, r"an object as `cluster`. Received: TF_CONFIG='\[3\]'"),
        ({"TF_CONFIG": '{"cluster": [3]}'}, "an object as `cluster`"),
        (
            {"TF_CONFIG": '{"cluster": {"ps": ["a:1"], "worker": ["b:1"]}}'},
            "the jobs 'chief' and 'worker' alone, not 'ps'",
        ),
        ({"TF_CONFIG": '{"cluster": {"worker": "a:1"}}'}, "a list of 'host:port' as 'worker'"),
        ({"TF_CONFIG": '{"cluster": {"chief": ["a:1", "b:1"]}}'}, "one chief at most"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}, "a `task`: type and index"),
        (
            {"TF_CONFIG": json.dumps(TF_CONFIG | {"task": {"type": "evaluator", "index": 0}})},
            "a task of type 'worker'. Received: .*evaluator",
        ),
        (
            {"TF_CONFIG": json.dumps(TF_CONFIG | {"task": {"type": "worker", "index": 3}})},
            "a task index from 0 to 2. Received: .*3",
        ),
        (
            {"TF_CONFIG": '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}'},
            "TF_CONFIG: a worker must be 'host:port'.*Received: 'a'",
        ),
        (
            {"TF_CONFIG": json.dumps(TF_CONFIG).replace("w2.vit:2224", "10.0.0.5:2222")},
            "TF_CONFIG: every worker must have an address of its own",
        ),
        (SRUN | {"SLURM_STEP_NODELIST": "node[1-2"}, r"SLURM_STEP_NODELIST='node\[1-2'"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST must be set"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2x2"}, "SLURM_STEP_TASKS_PER_NODE='2x2'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4"}, "of one step.*SLURM_STEP_TASKS_PER_NODE=4"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "5"}, "of one step.*SLURM_STEP_NUM_TASKS=5"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID must be an int from 0 to 1.*='2'"),
        (SRUN | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID must be an int from 0 to 1.*='2'"),
        (SRUN | {"MASTER_PORT": "65535"}, "Slurm: a worker must be 'host:port'.*65536"),
        (SRUN | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID must be an int of at least 0.*='x'"),
        (POD | {"WORLD_SIZE": "2"}, "JOB_COMPLETION_INDEX must be an int from 0 to 1.*='2'"),
        (POD | {"SERVICE_NAME": ""}, "SERVICE_NAME must be set"),
        (POD | {"SERVICE_NAME": "two words"}, "without blanks.*SERVICE_NAME='two words'"),
        (POD | {"WORLD_SIZE": "three"}, "WORLD_SIZE must be an int of at least 1.*='three'"),
        (POD | {"HOSTNAME": "my-vit-12"}, "HOSTNAME must be JOB-INDEX.*HOSTNAME='my-vit-12'"),
        (TORCHRUN | {"RANK": "1"}, "RANK must be an int from 0 to 0. Received: RANK='1'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE must be an int of at least 1"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR must be set"),
        (TORCHRUN | {"MASTER_ADDR": "::1"}, "an IPv4 address. Received: MASTER_ADDR='::1'"),
        (TORCHRUN | {"MASTER_PORT": "65534"}, "MASTER_PORT must be an int from 1 to 65533"),
        ({"RANK": "0"}, "WORLD_SIZE must be an int of at least 1. Received: WORLD_SIZE=None"),
    ],
)
def test_errors_of_the_environment(environ, message):
    with pytest.raises(ValueError, match=message):
        resolve_cluster(environ)


def test_index_must_be_that_of_a_worker():
    with pytest.raises(ValueError, match=r"one of 2 workers, from 0. Received: index=2"):
        Cluster(("a:1", "b:1"), 2, "TF_CONFIG")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node7", ["node7"]),
        ("n1,n2", ["n1", "n2"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("gpu-[009-010,015]-ib", ["gpu-009-ib", "gpu-010-ib", "gpu-015-ib"]),
        ("n[9-11],m[2].x.org,10.0.0.5", ["n9", "n10", "n11", "m2.x.org", "10.0.0.5"]),
    ],
)
def test_expand_hosts(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["n[1-2", "n1-2]", "n[]", "n[1,]", "n[a-b]", "n,,m", "n[[1]]", ""])
def test_expand_hosts_malformed(text):
    with pytest.raises(ValueError, match=re.escape(f"Received: hosts={text!r}.")):
        expand_hosts(text)


def test_expand_hosts_range_must_rise():
    with pytest.raises(ValueError, match=r"must rise. Received: \[3-1\] in 'n\[3-1\]'"):
        expand_hosts("n[3-1]")


# The meeting


def test_all_learn_all_addresses():
    port = free_ports(1)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(meet, "localhost", port, rank, 3, 20) for rank in (2, 1, 0)]
        assert [call.result() for call in calls] == [["localhost"] * 3] * 3


class Server:
    """Stands for the server of rank 0: guests from anywhere, who have said something."""

    def __init__(self, *guests):
        self.guests, self.theirs = [], []
        for address, words in guests:
            ours, theirs = socket.socketpair()
            theirs.sendall(words if isinstance(words, bytes) else json.dumps(words).encode())
            theirs.shutdown(socket.SHUT_WR)
            self.guests.append((ours, (address, 4711)))
            self.theirs.append(theirs)

    def settimeout(self, seconds):
        pass

    def accept(self):
        if not self.guests:
            raise TimeoutError
        return self.guests.pop(0)

    def answers(self):
        answers = [theirs.recv(1000) for theirs in self.theirs]
        return [json.loads(answer) if answer else None for answer in answers]


def test_addresses_are_those_that_rank_0_sees():
    places = {1: "10.0.0.9", 3: "127.0.1.1", 2: "10.0.0.7"}
    server = Server(*((place, {"rank": r, "world_size": 4}) for r, place in places.items()))
    hosts = ["node1", "10.0.0.9", "10.0.0.7", "node1"]
    assert module._hold_meeting(server, "node1", 4, time.monotonic()) == hosts
    assert server.answers() == [{"hosts": hosts}] * 3


def test_strangers_are_turned_away():
    words = [b"GET / HTTP/1.1\r\n\r\n", b"", [1], {"rank": "1"}]
    words += [{"rank": rank, "world_size": 2} for rank in (2, 0, -1, 1)]
    server = Server(*(("10.0.0.9", word) for word in words))
    assert module._hold_meeting(server, "node1", 2, time.monotonic()) == ["node1", "10.0.0.9"]
    assert server.answers() == [None] * 7 + [{"hosts": ["node1", "10.0.0.9"]}]


def test_of_two_workers_with_one_rank_the_first_is_told():
    places = [("10.0.0.9", 1), ("10.0.0.8", 1), ("10.0.0.7", 2)]
    server = Server(*((place, {"rank": rank, "world_size": 3}) for place, rank in places))
    hosts = ["node1", "10.0.0.8", "10.0.0.7"]
    assert module._hold_meeting(server, "node1", 3, time.monotonic()) == hosts
    error = {"error": "another worker has come with RANK=1"}
    assert server.answers() == [error, {"hosts": hosts}, {"hosts": hosts}]


def test_all_must_come():
    server = Server(("10.0.0.9", {"rank": 2, "world_size": 4}))
    with pytest.raises(TimeoutError, match=r"2 of WORLD_SIZE=4; missing: RANK \[1, 3\]"):
        module._hold_meeting(server, "node1", 4, time.monotonic())


def test_workers_must_agree_on_their_number():
    port = free_ports(1)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        zero = pool.submit(meet, "localhost", port, 0, 2, 20)
        with pytest.raises(ValueError, match=r"WORLD_SIZE is 2 at RANK=0 and 5 here.*RANK=4"):
            meet("localhost", port, 4, 5, 20)
        assert meet("localhost", port, 1, 2, 20) == zero.result() == ["localhost"] * 2


def test_rank_0_must_be_there():
    with pytest.raises(TimeoutError, match=r"RANK=0 must hold the meeting.*at RANK=1"):
        meet("localhost", free_ports(1), 1, 2, seconds=0.3)


def test_port_of_the_meeting_must_be_free():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(ValueError, match="must be free for the workers to meet"),
    ):
        meet("localhost", taken.getsockname()[1], 0, 2, seconds=1)


# Strategies


def run_workers(environments, code):
    """The last line that `code` prints in a fresh process of each environment."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not re.match("TF_CONFIG|SLURM|MASTER|RANK|WORLD_SIZE|LOCAL_", name)
    }
    clean |= {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=clean | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environ in environments
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


SUM = """
import json
import tensorflow as tf
from keras_vit.training.cluster import build_strategy, resolve_cluster

cluster = resolve_cluster()
strategy = build_strategy("auto", cluster)

@tf.function
def total():
    value = tf.constant([5.0, 11.0][cluster.index])
    return tf.distribute.get_replica_context().all_reduce("sum", value)

value = float(strategy.run(total))
print(json.dumps([cluster.source, type(strategy).__name__, value]))
"""


def test_two_workers_all_reduce():
    """Found by MASTER_ADDR."""
    cluster = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_ports(2)), "WORLD_SIZE": "2"}
    results = run_workers([cluster | {"RANK": rank, "LOCAL_RANK": rank} for rank in "10"], SUM)
    name = "CollectiveAllReduceStrategy"  # what MultiWorkerMirroredStrategy becomes
    assert results == [["MASTER_ADDR", name, 16.0]] * 2


AGREE = """
import json
from keras_vit.training.workers import join_workers

workers = join_workers("auto")
any_is = [workers.any(not workers.is_chief), workers.any(workers.is_chief), workers.any(False)]
print(json.dumps([workers.is_chief, any_is, workers.json_from_chief([workers.is_chief, "\u00e4"])]))
"""


def test_two_workers_agree():
    """Whoever of them has something to say, and on what the chief says; found by Slurm."""
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_ports(2)),
    }
    results = run_workers([slurm | {"SLURM_LOCALID": place} for place in "01"], AGREE)
    assert results == [[chief, [True, True, False], [True, "ä"]] for chief in (True, False)]


def test_mirrored_over_cpu_devices():
    code = """
import json
import tensorflow as tf
from keras_vit.training.cluster import build_strategy

[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
print(json.dumps([build_strategy("mirrored", None).num_replicas_in_sync]))
"""
    # TF_CONFIG, of the tasks of one job that train on their own, does not count.
    environ = {"TF_CONFIG": json.dumps(TF_CONFIG)}
    assert run_workers([environ], code) == [[3]]


def devices(kind, count):
    return [tf.config.PhysicalDevice(f"{kind}:{i}", kind) for i in range(count)]


def test_mirrored_needs_two_devices(monkeypatch):
    monkeypatch.setattr(
        tf.config, "list_logical_devices", lambda kind: devices(kind, kind == "CPU")
    )
    with pytest.raises(ValueError, match=r"2 logical CPU devices.*Received: devices=\['CPU:0'\]"):
        build_strategy("mirrored", None)


@pytest.mark.parametrize(
    ("gpus", "workers", "expected"),
    [(0, 0, None), (1, 0, None), (2, 0, "mirrored"), (2, 1, "mirrored"), (0, 2, "multiworker")],
)
def test_auto(monkeypatch, gpus, workers, expected):
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: devices(kind, gpus))
    monkeypatch.setattr(module, "_mirrored", lambda: "mirrored")
    monkeypatch.setattr(module, "_multiworker", lambda cluster: "multiworker")
    cluster = Cluster(("a:1", "b:1")[:workers], 0, "Slurm") if workers else None
    assert build_strategy("auto", cluster) == expected


def test_one_leaves_the_cluster_out():
    assert build_strategy("one", Cluster(("a:1", "b:1"), 0, "Slurm")) is None


@pytest.fixture
def machine(monkeypatch):
    """A machine of 3 GPUs, and what TensorFlow is told to do with it."""
    told = {}

    def strategy(communication_options):
        told["implementation"] = communication_options.implementation.value
        told["TF_CONFIG"] = json.loads(os.environ["TF_CONFIG"])

    monkeypatch.setenv("TF_CONFIG", "")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: devices(kind, 3))
    monkeypatch.setattr(
        tf.config, "set_visible_devices", lambda gpus, kind: told.update(visible=gpus)
    )
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", strategy)
    return told


def test_a_process_per_gpu(machine):
    cluster = Cluster(("127.0.0.1:1", "127.0.0.1:2"), 1, "MASTER_ADDR", gpu=1)
    build_strategy("auto", cluster)
    assert machine == {
        "visible": [tf.config.PhysicalDevice("GPU:1", "GPU")],
        "implementation": "NCCL",
        "TF_CONFIG": cluster.tf_config(),
    }


def test_more_processes_than_gpus(machine):
    with pytest.raises(ValueError, match=r"number of GPUs, which is 3.*LOCAL_RANK=3"):
        build_strategy("multiworker", Cluster(("a:1", "b:1"), 1, "MASTER_ADDR", gpu=3))


def test_waits_for_host_names(machine, monkeypatch, capsys):
    """TensorFlow gives up on a worker whose name is unknown, as a pod's is at first."""
    lookups = []

    def getaddrinfo(host, port):
        lookups.append(host)
        if host == "vit-1.peers" and len(lookups) < 4:
            raise socket.gaierror(-2, "Name or service not known")
        return ["an address"]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cluster = Cluster(("vit-0.peers:1", "vit-1.peers:1"), 0, "Kubernetes")
    build_strategy("multiworker", cluster)
    assert machine["TF_CONFIG"] == cluster.tf_config()
    assert lookups.count("vit-1.peers") in (2, 3)  # the order within a round is a set's
    assert capsys.readouterr().err == "waiting for the address of vit-1.peers\n"


def test_host_names_that_stay_unknown(machine, monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", -1)
    monkeypatch.setattr(module, "_is_known", lambda host: host == "a")
    with pytest.raises(TimeoutError, match="Received: no address of b, c"):
        build_strategy("multiworker", Cluster(("a:1", "c:1", "b:1"), 0, "Slurm"))
    assert machine == {}


def test_multiworker_needs_a_cluster():
    with pytest.raises(ValueError, match=r"set TF_CONFIG; or .*srun.*SERVICE_NAME.*MASTER_ADDR"):
        build_strategy("multiworker", None)


def test_unknown_strategy():
    with pytest.raises(ValueError, match=r"auto, one, mirrored, multiworker.*strategy='tpu'"):
        build_strategy("tpu", None)


# The job files


def test_kubernetes_job_is_a_cluster():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((DOCS / "jobs" / "kubernetes.yaml").read_text())
    name, pods = job["metadata"]["name"], job["spec"]["completions"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == pods
    template = job["spec"]["template"]["spec"]
    assert template["subdomain"] == service["metadata"]["name"]
    [container] = template["containers"]
    for index in range(pods):
        environ = {variable["name"]: variable["value"] for variable in container["env"]}
        environ |= {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"{name}-{index}"}
        names = (f"{name}-{i}.{template['subdomain']}:12000" for i in range(pods))
        assert resolve_cluster(environ) == Cluster(tuple(names), index, "Kubernetes")
    [bash, option, _] = container["command"]
    assert [bash, option] == ["bash", "-c"]


@pytest.mark.parametrize(
    ("status", "run_is", "told", "expected"),
    [
        (0, "finished", False, 0),
        (0, "interrupted", False, 143),  # another pod was told to stop
        (0, "running", False, 143),  # the same, before the chief has said so
        (0, "interrupted", True, 143),
        (0, "finished", True, 0),
        (1, "stopped", False, 1),
    ],
)
def test_kubernetes_job_is_started_again_until_it_is_finished(
    status, run_is, told, expected, tmp_path
):
    """With a command that does as `keras-vit train` does, and a pod that is told to stop."""
    yaml = pytest.importorskip("yaml")
    _, job = yaml.safe_load_all((DOCS / "jobs" / "kubernetes.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "run.json", {"results": {"status": run_is}})
    command = tmp_path / "keras-vit"
    stops = f"trap 'sleep 0.3; exit {status}' TERM; touch {tmp_path}/ready; sleep 60 & wait"
    does = stops if told else f"exit {status}"
    command.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked\n{does}\n')
    command.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(run), "DATA": "folder:x"}
    pod = subprocess.Popen(container["command"], env=environ, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while told and not (tmp_path / "ready").exists():
            assert pod.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if told:
            pod.terminate()
        assert pod.wait(30) == expected
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pod.pid, signal.SIGKILL)
    asked = f"train --resume {run} --strategy multiworker"
    assert (tmp_path / "asked").read_text().strip() == asked


@pytest.fixture
def slurm_job(tmp_path):
    """Runs the job file with commands that write down how they were called."""
    for command in ("srun", "scontrol"):
        path = tmp_path / "bin" / command
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'#!/bin/bash\necho {command} "$@"\n'
            'if [ -n "$run_is" ]; then echo "\\"status\\": \\"$run_is\\"" > "$RUN/run.json"; fi\n'
            f'exit "${{{command}_status:-0}}"\n'
        )
        path.chmod(0o755)

    def run(**environ):
        done = subprocess.run(
            ["bash", DOCS / "jobs" / "slurm.sh"],
            env={
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "SLURM_CPUS_PER_TASK": "6",
                "SLURM_JOB_ID": "77",
                "RUN": str(tmp_path / "run"),
                **environ,
            },
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    return run


def test_slurm_job(slurm_job, tmp_path):
    srun = "srun --kill-on-bad-exit=1 --cpus-per-task=6 keras-vit train"
    first = f"{srun} --data digits --out {tmp_path / 'run'} --strategy multiworker"
    again = f"{srun} --resume {tmp_path / 'run'} --strategy multiworker"
    (tmp_path / "run").mkdir()
    assert slurm_job(DATA="digits", run_is="finished") == (0, [first])
    assert slurm_job(run_is="finished") == (0, [again])
    # Told to stop, which is no error.
    assert slurm_job(run_is="interrupted") == (0, [again, "scontrol requeue 77"])
    assert slurm_job(srun_status="1") == (1, [again, "scontrol requeue 77"])
    requeued = {"SLURM_RESTART_COUNT": "2", "srun_status": "1"}
    assert slurm_job(**requeued) == (1, [again, "scontrol requeue 77"])
    assert slurm_job(**requeued | {"SLURM_RESTART_COUNT": "3"}) == (1, [again])


def test_slurm_job_asks_for_what_it_uses():
    text = (DOCS / "jobs" / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    assert text.count("#SBATCH") == len(options)
    assert options["ntasks-per-node"] == "1"
    assert {"nodes", "gpus-per-node", "cpus-per-task", "requeue"} <= options.keys()


def test_documentation_names_the_files_and_strategies():
    text = (DOCS / "cluster.md").read_text()
    assert set(re.findall(r"\]\((jobs/[^)]+)\)", text)) == {
        f"jobs/{path.name}" for path in (DOCS / "jobs").iterdir()
    }
    assert tuple(re.findall(r"^\| `([a-z]+)`", text, re.MULTILINE)) == module.STRATEGIES
    [config] = re.findall(r"TF_CONFIG='(.*)'", text)
    cluster = resolve_cluster({"TF_CONFIG": config})
    assert cluster == Cluster(("node1:12000", "node2:12000"), 0, "TF_CONFIG")
