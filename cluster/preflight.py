"""Check a cluster before hours are spent on it.

Nodes, links, storage, tracking and clocks are held against what one run needs.

Example (as a job of the cluster itself):

  ray job submit --working-dir . -- python -m cluster.preflight pretrain kind=bold shards=s3://brains/shards ...

Required: the command (data_sharding, pretrain, finetune) and its arguments

Prints a table; exits 2 when the run could not finish, and says what to fix.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import ClusterConfig, Needs
from cluster.errors import PreflightError
from cluster.ray.launch import ray_session
from cluster.ray.node_check import Link, NodeFacts, clock_s, node_facts
from cluster.storage.stores import store_for
from configs.entry import Command, load, main
from configs.words import aligned, counted, next_command, size_of

MAX_CLOCK_SKEW_S = 2.0  # an S3 server refuses requests 15 min off; metrics of several nodes should stay in order
MIN_LINK_SHARE = 0.5  # of the fastest: one slow link slows every step of every rank
NODE_TIMEOUT_S = 300.0
NUM_CLOCK_READS = 3
LINK_TIMEOUT_S = 120.0
TRACKING_TIMEOUT_S = 20.0
NO_NODE_S = 20.0  # several rounds of an autoscaler
WAIT_POLL_S = 1.0


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    found: str
    needed: str
    is_ok: bool


@dataclass
class PreflightConfig:
    """The command to check for."""

    part: str
    overrides: list[str]


def run(config: PreflightConfig) -> None:
    rows = preflight(needs_of(config.part, config.overrides))
    print(table(rows))
    if failed := [row for row in rows if not row.is_ok]:
        raise PreflightError(f"{len(failed)} of {len(rows)} checks failed; this run would not finish")
    print(next_command(config.part, *config.overrides))


def plan(config: PreflightConfig) -> str:
    return f"check this cluster for: python -m {shlex.join([config.part, *config.overrides])}"


def command() -> Command:
    return Command(PreflightConfig, run, plan)


def needs_of(part: str, overrides: list[str]) -> Needs:
    """What `python -m <part> <overrides>` needs; PreflightError when it needs no cluster."""
    command, config = load(part, overrides)
    needs = command.needs(config) if command.needs is not None else None
    if needs is None or needs.cluster is None:
        raise PreflightError(f"python -m {part} runs in one process; run it without a check")
    return needs


def preflight(needs: Needs) -> list[Row]:
    """Every check, each with what was found and what is needed."""
    cluster = needs.cluster
    assert cluster is not None
    if cluster.kind == "inline":
        raise PreflightError("cluster=inline runs in this process alone; name the cluster to check: cluster=ray")
    with ray_session(cluster):
        wait_for_nodes(cluster)
        nodes, skews = ask_nodes(needs, cluster)
        rows = [*capacity(cluster, nodes), *same_versions(nodes), *clocks(nodes, skews), *disks(needs, nodes)]
        rows += [Row(f"{node.host}: storage", "refused", problem, False) for node in nodes for problem in node.problems]
        rows += speeds(nodes)
        rows += links(cluster)
    if not any(node.problems for node in nodes):
        guarantee = store_for(needs.results).create_guarantee()
        rows.append(Row("put-if-absent", guarantee.words, "one writer a name", True))
    if needs.tracking is not None:
        rows.append(tracking(needs.tracking))
    return rows


def wait_for_nodes(cluster: ClusterConfig) -> None:
    """Ask an autoscaler for nodes, as the run will, and return once there are enough of them, none is on its way any
    more, or the run would give up: a cluster may have no worker before somebody asks for one."""
    from ray.autoscaler.sdk import request_resources

    give_up_at = time.monotonic() + cluster.start_timeout_s
    last_sign_at = None
    try:
        while not has_resources(cluster) and time.monotonic() < give_up_at:
            if last_sign_at is None:
                request_resources(bundles=[bundle_of_worker(cluster)] * cluster.num_workers)
                print(f"waiting at most {cluster.start_timeout_s:.0f} s for nodes, if any are coming", flush=True)
            if last_sign_at is None or are_nodes_coming():
                last_sign_at = time.monotonic()
            if time.monotonic() - last_sign_at > NO_NODE_S:
                break
            time.sleep(WAIT_POLL_S)
    finally:
        if last_sign_at is not None:
            request_resources(bundles=[])  # what came stays until it has been idle for a while


def has_resources(cluster: ClusterConfig) -> bool:
    """True when the nodes there are have CPUs and GPUs for as many workers as the run needs."""
    import ray

    resources = ray.cluster_resources()
    return all(resources.get(resource, 0) >= number for resource, number in least_resources(cluster).items())


def bundle_of_worker(cluster: ClusterConfig) -> dict[str, int]:
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})


def least_resources(cluster: ClusterConfig) -> dict[str, int]:
    """What the fewest workers that the run starts with take together."""
    num_workers = cluster.min_workers or cluster.num_workers
    return {resource: num_workers * number for resource, number in bundle_of_worker(cluster).items()}


def are_nodes_coming() -> bool:
    """True when the cluster's autoscaler, of either generation, says that nodes are on their way."""
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    if status.pending_launches or status.pending_nodes:
        return True
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
    return bool(report.get("pending_launches") or report.get("pending_nodes"))


def alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def hosts_ranks(node: Mapping[str, Any], cluster: ClusterConfig) -> bool:
    """True where a worker of the run may be placed: not on a head without GPUs, or without CPUs for Ray."""
    resources = node["Resources"]
    has_gpu = not cluster.use_gpu or resources.get("GPU", 0) >= 1
    return has_gpu and resources.get("CPU", 0) >= cluster.cpus_per_worker


def pinned(node: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a task or an actor that runs on this node even when it is busy, or fails."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def ask_nodes(needs: Needs, cluster: ClusterConfig) -> tuple[list[NodeFacts], list[float]]:
    """The facts of every node, asked all at once as a run would, and how far its clock is from this one's."""
    import ray

    remote: Any = ray.remote
    task = remote(max_retries=0)(node_facts)
    folders = [folder for folder in (needs.scratch, needs.cache and needs.cache[0]) if folder]
    arguments = {
        "written": [needs.results],
        "read": [f"{location.rstrip('/')}/{name}" for location, name in needs.inputs.items() if name is not None],
        "uses_gpu": cluster.use_gpu,
    }
    members = alive_nodes()
    pending = [
        task.options(**pinned(node)).remote(folders=folders if hosts_ranks(node, cluster) else [], **arguments)
        for node in members
    ]
    nodes, skews = [], []
    for node, facts in zip(members, pending, strict=True):
        try:
            nodes.append(ray.get(facts, timeout=NODE_TIMEOUT_S))
            skews.append(clock_skew(node))
        except ray.exceptions.RayError as error:
            raise PreflightError(
                f"node {node['NodeManagerAddress']} did not answer within {NODE_TIMEOUT_S:.0f} s or failed "
                f"({str(error).splitlines()[0]}); look at it with 'ray status', or take it out of the cluster"
            ) from error
    return nodes, skews


def clock_skew(node: Mapping[str, Any]) -> float:
    """Seconds a node's clock is ahead of this one's, within half of the shortest round trip."""
    import ray

    clock: Any = ray.remote(clock_s)
    found = []
    for _ in range(NUM_CLOCK_READS):  # the first may wait for a process to start, and would blame the clock
        asked = time.time()
        there = ray.get(clock.options(**pinned(node)).remote(), timeout=NODE_TIMEOUT_S)
        answered = time.time()
        found.append((answered - asked, there - (asked + answered) / 2))
    return min(found)[1]


def capacity(cluster: ClusterConfig, nodes: list[NodeFacts]) -> list[Row]:
    """CPUs and GPUs of the whole cluster against those of all workers."""
    import ray

    resources, least = ray.cluster_resources(), least_resources(cluster)
    found = resources.get("CPU", 0)
    rows = [Row("CPUs", f"{found:.0f} on {counted(len(nodes), 'node')}", f"{least['CPU']}", found >= least["CPU"])]
    if "GPU" in least:
        memory = ", ".join(f"{node.host} {node.num_gpus} x {size_of(node.gpu_bytes)}" for node in nodes)
        num_gpus = min(int(resources.get("GPU", 0)), sum(node.num_gpus for node in nodes))
        rows.append(Row("GPUs", f"{num_gpus} ({memory})", f"{least['GPU']}", num_gpus >= least["GPU"]))
    return rows


def same_versions(nodes: list[NodeFacts]) -> list[Row]:
    """One row a package: the same everywhere."""
    rows = []
    for package in nodes[0].versions:
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            by_version.setdefault(node.versions[package], []).append(node.host)
        found = "; ".join(f"{version} on {', '.join(hosts)}" for version, hosts in by_version.items())
        is_ok = len(by_version) == 1 and "missing" not in by_version
        rows.append(Row(package, next(iter(by_version)) if is_ok else found, "the same on all nodes", is_ok))
    return rows


def clocks(nodes: list[NodeFacts], skews: list[float]) -> list[Row]:
    worst = max(range(len(nodes)), key=lambda index: abs(skews[index]))
    found = f"{skews[worst]:+.3f} s ({nodes[worst].host})"
    return [Row("clocks", found, f"within {MAX_CLOCK_SKEW_S:g} s", abs(skews[worst]) <= MAX_CLOCK_SKEW_S)]


def disks(needs: Needs, nodes: list[NodeFacts]) -> list[Row]:
    """Free space of every node's scratch and cache folders; those of one disk together."""
    wanted = {needs.scratch: needs.scratch_bytes()} if needs.scratch is not None else {}
    if needs.cache is not None:
        wanted[needs.cache[0]] = wanted.get(needs.cache[0], 0) + needs.cache[1]
    rows = []
    for node in nodes:
        for disk in dict.fromkeys(node.disks.values()):
            folders = [folder for folder in node.free_bytes if node.disks[folder] == disk]
            free, needed = max(node.free_bytes[each] for each in folders), sum(wanted[each] for each in folders)
            name = f"{node.host}: disk of {' and '.join(folders)}"
            rows.append(Row(name, size_of(free), size_of(needed), free >= needed))
    return rows


def speeds(nodes: list[NodeFacts]) -> list[Row]:
    """What every node reads and writes per second; shown, never refused."""
    return [
        Row(f"{node.host}: {what}", f"{size_of(speed)}/s", "-", True)
        for node in nodes
        for what, speed in node.speeds.items()
    ]


def links(cluster: ClusterConfig) -> list[Row]:
    """Bandwidth of collectives between the nodes of ranks: every node's link, none much slower than the fastest."""
    import ray

    members = [node for node in alive_nodes() if hosts_ranks(node, cluster)]
    if len(members) < 2:
        return [Row("collectives", f"{counted(len(members), 'node')} for ranks", "-", True)]
    link: Any = ray.remote(Link)
    actors = [link.options(**pinned(node)).remote() for node in members]
    try:
        address = ray.get(actors[0].address.remote(), timeout=LINK_TIMEOUT_S)
        pending = [
            actor.all_reduce.remote(rank, len(actors), address, LINK_TIMEOUT_S) for rank, actor in enumerate(actors)
        ]
        found = ray.get(pending, timeout=2 * LINK_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        return [Row("collectives", f"failed: {reason}", "every node reaches every other on all ports", False)]
    finally:
        for actor in actors:
            ray.kill(actor)
    fastest = max(found)
    return [
        Row(
            f"{node['NodeManagerHostname']}: collectives",
            f"{size_of(speed)}/s",
            f"{MIN_LINK_SHARE:.0%} of the fastest",
            speed >= MIN_LINK_SHARE * fastest,
        )
        for node, speed in zip(members, found, strict=True)
    ]


def tracking(uri: str) -> Row:
    """Whether the tracking server takes a run: one is written and deleted again."""
    import os

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{TRACKING_TIMEOUT_S:.0f}")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    started = time.perf_counter()
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("preflight")
        experiment_id = experiment.experiment_id if experiment else client.create_experiment("preflight")
        run = client.create_run(experiment_id, run_name="preflight")
        client.log_metric(run.info.run_id, "preflight", 1.0)
        client.set_terminated(run.info.run_id)
        client.delete_run(run.info.run_id)
    except MlflowException as error:
        return Row("tracking server", f"{uri} refused: {str(error).splitlines()[0]}", "it takes a run", False)
    return Row("tracking server", f"{uri}: a run in {time.perf_counter() - started:.1f} s", "it takes a run", True)


def table(rows: list[Row]) -> str:
    """Aligned lines: ok or FAILED, check, found, needed."""
    return aligned([("ok" if row.is_ok else "FAILED", row.check, row.found, row.needed) for row in rows])


if __name__ == "__main__":
    main("cluster.preflight", __doc__, command, positional=("part", "overrides..."))
