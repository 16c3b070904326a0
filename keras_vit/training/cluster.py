"""Finding the workers of a training in the environment, and the strategy that spans them."""

import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import socket
import time

import tensorflow as tf
from rich.console import Console

STRATEGIES = ("auto", "one", "mirrored", "multiworker")

# How long a worker waits for the others, which a queue or an image to pull may hold up.
WAIT_SECONDS = 900

# The first port of a worker where nothing says another. Of Slurm's jobs, whose workers may share
# a node, each has 16 in a row, below 32768, where Linux begins to hand out ports by itself.
FIRST_PORT = 12000
PORTS_PER_JOB = 16

_MESSAGE_BYTES = 1 << 20  # the longest message of a meeting: addresses of thousands of workers


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that train one model together, and which of them this one is.

    Args:
        workers: Their addresses "host:port", the same in the same order in every process.
        index: Which of them is this process, from 0; worker 0 is the chief.
        source: What said so: "TF_CONFIG", "Slurm", "Kubernetes" or "MASTER_ADDR".
        gpu: Which of the GPUs that it sees this process is to use; None: all of them.

    Raises:
        ValueError: An address is not "host:port" or stands twice, or there is no such worker.
    """

    workers: tuple[str, ...]
    index: int
    source: str
    gpu: int | None = None

    def __post_init__(self):
        for worker in self.workers:
            match = re.fullmatch(r"\S+:(\d{1,5})", worker) if isinstance(worker, str) else None
            if not match or not 0 < int(match[1]) < 65536:
                raise ValueError(
                    f"{self.source}: a worker must be 'host:port', with a port from 1 to 65535. "
                    f"Received: {worker!r}."
                )
        if len(set(self.workers)) < len(self.workers):
            raise ValueError(
                f"{self.source}: every worker must have an address of its own. "
                f"Received: workers={list(self.workers)}."
            )
        if not 0 <= self.index < len(self.workers):
            raise ValueError(
                f"{self.source}: the index must be that of one of {len(self.workers)} workers, "
                f"from 0. Received: index={self.index}."
            )

    @property
    def is_chief(self):
        """Whether this process is the one that writes files."""
        return self.index == 0

    def tf_config(self):
        """The cluster as the content of TF_CONFIG; a chief of its own is worker 0 there."""
        return {
            "cluster": {"worker": list(self.workers)},
            "task": {"type": "worker", "index": self.index},
        }


def resolve_cluster(environ=os.environ):
    """Finds the workers of this training in the environment variables.

    The first of these that is there: TF_CONFIG (also Ray's), the variables that Slurm's `srun`
    gives its tasks, those of a Kubernetes indexed job (with WORLD_SIZE and SERVICE_NAME from its
    file), and MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, as torchrun sets them. With the last
    the workers meet at MASTER_ADDR, to learn each other's address: the call returns when all of
    them have come. docs/cluster.md has an example of each.

    Args:
        environ: The environment variables, a mapping from str to str.

    Returns:
        The `Cluster`, which may have one worker alone; None if nothing speaks of workers. A batch
        script and an interactive shell of Slurm without `srun` are one process: None.

    Raises:
        ValueError: A variable is missing, malformed or at odds with another.
        TimeoutError: The other workers did not come to the meeting within 15 minutes.

    Source: the variables: TensorFlow's guide to TF_CONFIG; Slurm's srun(1), "output environment
    variables"; Kubernetes' "Job with Pod-to-Pod Communication"; torch/distributed/run.py.
    Difference from TensorFlow's SlurmClusterResolver: a task is known by its node and its place
    there, not by its rank, so that any `--distribution` is right; GPUs are left to Slurm.
    """
    for find in (_from_tf_config, _from_slurm, _from_kubernetes, _from_master):
        cluster = find(environ)
        if cluster is not None:
            return cluster
    return None


def build_strategy(name, cluster):
    """Makes the tf.distribute strategy of a training.

    "multiworker" must be made before TensorFlow does anything else in the process; it returns
    when all workers have come.

    Args:
        name: "auto": "multiworker" for a cluster of more than one worker, else "mirrored" for
            more than one GPU, else "one". "one": one device. "mirrored": all GPUs of this
            machine, or all logical CPU devices if there is no GPU. "multiworker": all GPUs of all
            workers, or their CPUs. "one" and "mirrored" leave the cluster out: this is how tasks
            of one job run a training each.
        cluster: The `Cluster` of `resolve_cluster`, or None.

    Returns:
        A `tf.distribute.Strategy`, or None for one device.

    Raises:
        ValueError: There is no such name, no cluster for "multiworker" or one that does not fit
            the GPUs, or nothing to mirror on.
        TimeoutError: A worker's host name was unknown for 15 minutes.
    """
    if name not in STRATEGIES:
        raise ValueError(
            f"The strategy must be one of {', '.join(STRATEGIES)}. Received: strategy={name!r}."
        )
    if name == "auto":
        several = cluster is not None and len(cluster.workers) > 1
        # Not the logical devices: to ask for them would start TensorFlow.
        gpus = tf.config.get_visible_devices("GPU")
        name = "multiworker" if several else "mirrored" if len(gpus) > 1 else "one"
    if name == "multiworker":
        return _multiworker(cluster)
    return _mirrored() if name == "mirrored" else None


def _mirrored():
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = [device.name for device in devices]
    if len(names) < 2 and devices[0].device_type == "CPU":
        raise ValueError(
            "The strategy 'mirrored' needs a GPU, or at least 2 logical CPU devices "
            f"(tf.config.set_logical_device_configuration). Received: devices={names}."
        )
    return tf.distribute.MirroredStrategy(names)


def _multiworker(cluster):
    if cluster is None:
        raise ValueError(
            "The strategy 'multiworker' needs to know the workers: set TF_CONFIG; or start them "
            "with Slurm's `srun`; or in a Kubernetes indexed job set WORLD_SIZE and SERVICE_NAME; "
            "or set MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE. Received: none of these."
        )
    gpus = tf.config.get_visible_devices("GPU")
    if cluster.gpu is not None and len(gpus) > 1:  # a single one was bound by the launcher
        if cluster.gpu >= len(gpus):
            raise ValueError(
                f"LOCAL_RANK must be below the number of GPUs, which is {len(gpus)}: start a "
                f"process per GPU at most. Received: LOCAL_RANK={cluster.gpu}."
            )
        gpus = [gpus[cluster.gpu]]
        tf.config.set_visible_devices(gpus, "GPU")
    _wait_for_names({worker.rsplit(":", 1)[0] for worker in cluster.workers})
    os.environ["TF_CONFIG"] = json.dumps(cluster.tf_config())
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if gpus else implementation.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def _wait_for_names(hosts):
    """Waits until all hosts are known: TensorFlow waits for a worker, but not for its name.

    A pod's name reaches Kubernetes' DNS some seconds after the pod was started.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    told = False
    while unknown := sorted(host for host in hosts if not _is_known(host)):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"The host names of all workers must be known within {WAIT_SECONDS} s. "
                f"Received: no address of {', '.join(unknown)}."
            )
        if not told:
            _say(f"waiting for the address of {', '.join(unknown)}")
            told = True
        time.sleep(1)


def _is_known(host):
    with contextlib.suppress(OSError):
        return bool(socket.getaddrinfo(host.strip("[]"), None))
    return False


def _say(message):
    Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)


# TF_CONFIG


def _from_tf_config(environ):
    text = environ.get("TF_CONFIG", "").strip()
    try:
        config = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(
            f"TF_CONFIG must be JSON: {error}. Received: TF_CONFIG={text!r}."
        ) from None
    if not config or (isinstance(config, dict) and not config.get("cluster")):
        return None  # as TensorFlow takes it: a machine of its own

    def check(holds, expected):
        if not holds:
            raise ValueError(f"TF_CONFIG must have {expected}. Received: TF_CONFIG={text!r}.")

    check(
        isinstance(config, dict) and isinstance(config["cluster"], dict), "an object as `cluster`"
    )
    jobs = config["cluster"]
    for job, addresses in jobs.items():
        check(job in ("chief", "worker"), f"the jobs 'chief' and 'worker' alone, not {job!r}")
        check(isinstance(addresses, list), f"a list of 'host:port' as {job!r}")
    check(len(jobs.get("chief", [])) <= 1, "one chief at most")
    task = config.get("task")
    check(isinstance(task, dict) and {"type", "index"} <= task.keys(), "a `task`: type and index")
    kind, index = task["type"], str(task["index"])
    check(kind in list(jobs), f"a task of type {' or '.join(map(repr, jobs))}")
    check(
        index.isdecimal() and int(index) < len(jobs[kind]),
        f"a task index from 0 to {len(jobs[kind]) - 1}",
    )
    before = len(jobs.get("chief", [])) if kind == "worker" else 0
    workers = (*jobs.get("chief", []), *jobs.get("worker", []))
    return Cluster(workers, before + int(index), "TF_CONFIG")


# Slurm


def _from_slurm(environ):
    # `srun` alone sets SLURM_STEP_NUM_TASKS. SLURM_NTASKS stands in the batch script and in an
    # interactive shell as well, where it is the number of the tasks that could be started.
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    if "TORCHELASTIC_RUN_ID" in environ:
        return None  # a task of Slurm is a torchrun here, whose children are the workers
    total = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    hosts = expand_hosts(_text(environ, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST")
    tasks = _tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if len(hosts) != len(tasks) or sum(tasks) != total:
        raise ValueError(
            "Slurm's variables must be of one step: as many entries in SLURM_STEP_NODELIST as in "
            "SLURM_STEP_TASKS_PER_NODE, whose sum is SLURM_STEP_NUM_TASKS. Received: "
            f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']}, SLURM_STEP_TASKS_PER_NODE="
            f"{environ['SLURM_STEP_TASKS_PER_NODE']}, SLURM_STEP_NUM_TASKS={total}."
        )
    node = _number(environ, "SLURM_NODEID", 0, len(hosts) - 1)
    local = _number(environ, "SLURM_LOCALID", 0, tasks[node] - 1)
    port = _slurm_port(environ)
    workers = [
        f"{host}:{port + place}"
        for host, count in zip(hosts, tasks, strict=True)
        for place in range(count)
    ]
    return Cluster(tuple(workers), sum(tasks[:node]) + local, "Slurm")


def _slurm_port(environ):
    """The first port on every node: MASTER_PORT, or by the job's and the step's number."""
    if "MASTER_PORT" in environ:
        return _number(environ, "MASTER_PORT", 1, 65535)
    job = _number(environ, "SLURM_JOB_ID")
    step = _number(environ, "SLURM_STEP_ID")
    # 101: steps of one job that run at the same time are far from the next jobs.
    return FIRST_PORT + PORTS_PER_JOB * ((job + 101 * step) % 1000)


def _tasks_per_node(text):
    """Tasks of each node: "2(x3),1" is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(
                "SLURM_STEP_TASKS_PER_NODE must be as '2(x3),1'. "
                f"Received: SLURM_STEP_TASKS_PER_NODE={text!r}."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text, name="hosts"):
    """Expands Slurm's short form of host names.

    Example:

        expand_hosts("gpu-[08-10,015]-ib,login")
        # ["gpu-08-ib", "gpu-09-ib", "gpu-10-ib", "gpu-015-ib", "login"]

    Args:
        text: Names with commas between them; in each, any number of brackets with numbers and
            ranges, of which the last counts fastest. Leading zeros stay.
        name: What an error calls the text.

    Returns:
        A list of host names, in order.

    Raises:
        ValueError: A bracket is not closed, or a name or a range is malformed.

    Source: Slurm's slurm.conf(5), NodeName.
    """
    part = r"(?:[^\s,\[\]]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"
    if not re.fullmatch(f"{part}(?:,{part})*", text):
        raise ValueError(f"{name} must be as 'n[01-03,7],m1'. Received: {name}={text!r}.")
    return [host for names in re.findall(part, text) for host in _expand(names)]


def _expand(names):
    """The names of one entry, "a[1-2]b" for example: those of its first bracket, and so on."""
    before, bracket, rest = re.fullmatch(r"([^\[]*)(?:\[(.*?)\](.*))?", names).groups()
    if bracket is None:
        return [before]
    numbers = []
    for entry in bracket.split(","):
        first, _, last = entry.partition("-")
        last = last or first
        if int(last) < int(first):
            raise ValueError(f"A range of hosts must rise. Received: [{entry}] in {names!r}.")
        numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [before + number + end for number in numbers for end in _expand(rest)]


# Kubernetes


def _from_kubernetes(environ):
    # Every indexed job has an index, also one whose pods do different things: the job's file says
    # that they belong together. With RANK set, a launcher in the pod has started this process.
    of_cluster = "WORLD_SIZE" in environ or "SERVICE_NAME" in environ
    if "JOB_COMPLETION_INDEX" not in environ or "RANK" in environ or not of_cluster:
        return None
    count = _number(environ, "WORLD_SIZE", 1)
    index = _number(environ, "JOB_COMPLETION_INDEX", 0, count - 1)
    service = _text(environ, "SERVICE_NAME")
    pod = _text(environ, "HOSTNAME")
    if not pod.endswith(f"-{index}"):
        raise ValueError(
            "HOSTNAME must be JOB-INDEX, as Kubernetes names the pods of an indexed job (without "
            f"hostNetwork). Received: HOSTNAME={pod!r}, JOB_COMPLETION_INDEX={index}."
        )
    job = pod.removesuffix(f"-{index}")
    port = _number(environ, "MASTER_PORT", 1, 65535) if "MASTER_PORT" in environ else FIRST_PORT
    workers = (f"{job}-{i}.{service}:{port}" for i in range(count))
    return Cluster(tuple(workers), index, "Kubernetes")


# MASTER_ADDR


def _from_master(environ):
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    count = _number(environ, "WORLD_SIZE", 1)
    rank = _number(environ, "RANK", 0, count - 1)
    host = _text(environ, "MASTER_ADDR")
    if ":" in host:
        raise ValueError(
            f"MASTER_ADDR must be a host name or an IPv4 address. Received: MASTER_ADDR={host!r}."
        )
    # MASTER_PORT itself may be taken, by torchrun; the meeting is at the next port. After that,
    # a port for each rank, so that it does not matter how many of them share a machine.
    port = _number(environ, "MASTER_PORT", 1, 65535 - 1 - count)
    hosts = meet(host, port + 1, rank, count)
    workers = (f"{host}:{port + 2 + i}" for i, host in enumerate(hosts))
    local_size = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else None
    several = "LOCAL_RANK" in environ and local_size != 1
    gpu = _number(environ, "LOCAL_RANK") if several else None
    return Cluster(tuple(workers), rank, "MASTER_ADDR", gpu)


def meet(host, port, rank, world_size, seconds=WAIT_SECONDS):
    """Lets workers that know the address of rank 0 alone learn those of all.

    Each of them connects to rank 0 and says its rank; rank 0 sees from where, and when it has
    seen all, it tells them. Messages are one line of JSON. A worker that was started again takes
    the place of its predecessor; who says something else is turned away.

    Args:
        host: Name or IPv4 address of the machine of rank 0.
        port: A free port there.
        rank: Of this process, in [0, world_size).
        world_size: Number of the workers.
        seconds: How long to wait for the others.

    Returns:
        A list of the hosts of ranks 0 to world_size - 1: `host` for all that run on its machine,
        and the IP addresses of the others.

    Raises:
        ValueError: The port is taken, two workers have the same rank, or another `world_size`
            than rank 0.
        TimeoutError: Not all came, or rank 0 was not there, within `seconds`.
    """
    deadline = time.monotonic() + seconds
    if world_size > 1:
        _say(f"waiting for {world_size - 1} other workers at {host}:{port}")
    if rank > 0:
        return _join_meeting(host, port, rank, world_size, deadline)
    try:
        server = socket.create_server(("", port), backlog=world_size)
    except OSError as error:
        raise ValueError(
            f"The port after MASTER_PORT must be free for the workers to meet, but: {error}. "
            f"Received: MASTER_PORT={port - 1}."
        ) from None
    with server:
        return _hold_meeting(server, host, world_size, deadline)


def _hold_meeting(server, host, world_size, deadline):
    """Rank 0: gathers the hosts of all ranks and tells them; see `meet`."""
    hosts, guests = {0: host}, {}
    with contextlib.ExitStack() as stack:
        while len(hosts) < world_size:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                guest, (address, _) = server.accept()
            except TimeoutError:
                missing = sorted(set(range(world_size)) - hosts.keys())
                raise TimeoutError(
                    f"All workers must come to the meeting at MASTER_ADDR in time. Received: "
                    f"{len(hosts)} of WORLD_SIZE={world_size}; missing: RANK {missing}."
                ) from None
            stack.enter_context(guest)
            rank = _admit(guest, world_size)
            if rank is None:
                guest.close()
                continue
            if rank in guests:
                _send(guests[rank], {"error": f"another worker has come with RANK={rank}"})
            guests[rank] = guest
            # Who comes from the machine itself may come from an address that only it knows.
            hosts[rank] = host if ipaddress.ip_address(address).is_loopback else address
        workers = [hosts[rank] for rank in range(world_size)]
        for guest in guests.values():
            _send(guest, {"hosts": workers})
    return workers


def _admit(guest, world_size):
    """The rank of a guest, or None if it is no worker of this training."""
    guest.settimeout(5)  # a stranger who says nothing must not hold up the others
    message = _receive(guest)
    if message is None or not isinstance(message.get("rank"), int):
        return None
    if message.get("world_size") != world_size:
        error = f"WORLD_SIZE is {world_size} at RANK=0 and {message.get('world_size')} here"
        _send(guest, {"error": error})
        return None
    return message["rank"] if 0 < message["rank"] < world_size else None


def _join_meeting(host, port, rank, world_size, deadline):
    """Another rank: says so to rank 0 and hears the hosts of all; see `meet`."""
    while (left := deadline - time.monotonic()) > 0:
        with (
            contextlib.suppress(OSError),  # rank 0 is not there yet, or was started again
            socket.create_connection((host, port), timeout=min(left, 10)) as connection,
        ):
            connection.settimeout(left)
            _send(connection, {"rank": rank, "world_size": world_size})
            answer = _receive(connection) or {}
            if "error" in answer:
                raise ValueError(
                    f"The workers at MASTER_ADDR={host} do not fit: {answer['error']}. "
                    f"Received: RANK={rank}, WORLD_SIZE={world_size}."
                )
            if "hosts" in answer:
                return answer["hosts"]
        time.sleep(min(0.5, max(deadline - time.monotonic(), 0)))
    raise TimeoutError(
        f"RANK=0 must hold the meeting of the workers at {host}:{port} (MASTER_ADDR, the port "
        f"after MASTER_PORT), and all must come in time. Received: no answer, at RANK={rank}."
    )


def _send(connection, message):
    with contextlib.suppress(OSError):  # it has gone: the strategy will miss it, or it returns
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection):
    """The other side's message, or None if it is not one."""
    with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as file:
        message = json.loads(file.readline(_MESSAGE_BYTES))
        return message if isinstance(message, dict) else None
    return None


# Variables


def _text(environ, name):
    value = environ.get(name, "")
    if not value or re.search(r"\s", value):
        raise ValueError(
            f"{name} must be set, without blanks in it. Received: {name}={environ.get(name)!r}."
        )
    return value


def _number(environ, name, low=0, high=None):
    value = environ.get(name, "")
    if not value.isdecimal() or int(value) < low or (high is not None and int(value) > high):
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name} must be an int {limits}. Received: {name}={environ.get(name)!r}.")
    return int(value)
