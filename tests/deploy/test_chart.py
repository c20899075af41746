"""The chart as Helm renders it, against the schemas of Kubernetes: `make check-deploy`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_manifests import validator

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy/helm/bonsai-lora"
EXAMPLES = sorted((ROOT / "deploy/helm/examples").glob("*.yaml"))
HELM = shutil.which("helm") or shutil.which("helm", path=str(Path(sys.prefix) / "helm"))

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(HELM is None, reason="there is no helm; run make check-deploy"),
]


def helm(*arguments):
    return subprocess.run([HELM, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def rendered(*arguments):
    done = helm("template", "release", CHART, "--namespace", "production", *arguments)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def refusal(*pairs):
    """What Helm says when it refuses the values `pairs`."""
    flags = [flag for pair in pairs for flag in ("--set", pair)]
    done = helm("template", "release", CHART, *flags)
    assert done.returncode == 1
    return done.stderr


def of_kind(manifests, kind):
    return [one for one in manifests if one["kind"] == kind]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_lint_finds_nothing(example):
    done = helm("lint", "--strict", CHART, "--values", example)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 chart(s) failed" in done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_rendered_manifests_follow_their_schemas(example, tmp_path):
    manifests = rendered("--values", example)
    monitors = of_kind(manifests, "ServiceMonitor")
    for monitor in monitors:
        assert not list(validator("ServiceMonitor").iter_errors(monitor))
    path = tmp_path / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(one for one in manifests if one not in monitors))
    tool = Path(sys.executable).with_name("kubernetes-validate")
    done = subprocess.run(
        [tool, "--strict", "-k", "1.37", path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path.write_text(path.read_text().replace("failureThreshold", "failureTreshold"))
    done = subprocess.run([tool, "--strict", "-k", "1.37", path], capture_output=True, timeout=60)
    assert done.returncode == 1


def test_a_volume_belongs_to_one_pod():
    assert "a store on a volume belongs to one pod" in refusal("access.noAuth=true", "replicas=2")
    scaled = refusal("access.noAuth=true", "autoscaling.enabled=true")
    assert "a store on a volume belongs to one pod" in scaled
    bucket = ["--set", "access.noAuth=true,store.bucket=s3://b/p,replicas=3"]
    (deployment,) = of_kind(rendered(*bucket), "Deployment")
    assert deployment["spec"]["replicas"] == 3
    assert not of_kind(rendered(*bucket), "PersistentVolumeClaim")


def test_nobody_gets_in_by_oversight():
    assert "set access.keysSecret, or access.noAuth" in refusal("replicas=1")
    both = refusal("access.noAuth=true", "access.keysSecret=k")
    assert "contradict each other" in both
    assert "needs a key of scope admin" in refusal(
        "access.keysSecret=k", "serviceMonitor.enabled=true"
    )


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ("replica=3", "replica"),
        ("store.bucket=http://b", "bucket"),
        ("settings.store=/x", "store"),
        ("store.volume.accessModes={ReadWriteMany}", "accessModes"),
        ("workers=0", "workers"),
    ],
)
def test_values_are_checked(pair, named):
    assert named in refusal("access.noAuth=true", pair)


def test_pods_end_only_after_their_requests():
    flags = "access.noAuth=true,preStopSeconds=7,shutdownSeconds=50"
    (deployment,) = of_kind(rendered("--set", flags), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    given = {one["name"]: one["value"] for one in container["env"]}
    ends = int(given["BONSAI_LORA_SHUTDOWN_SECONDS"])
    assert (waits, ends) == (7, 50)
    assert pod["terminationGracePeriodSeconds"] > waits + ends


def test_large_settings_are_written_in_full():
    flags = ["--set", "access.noAuth=true,settings.max_body_bytes=67108864"]
    flags += ["--set", "settings.stall_seconds=2.5"]
    (deployment,) = of_kind(rendered(*flags), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"]}
    assert given["BONSAI_LORA_MAX_BODY_BYTES"] == "67108864"
    assert given["BONSAI_LORA_STALL_SECONDS"] == "2.5"


def test_the_disk_of_a_replica_holds_more_than_its_cache():
    flags = "access.noAuth=true,store.bucket=s3://b,store.cacheBytes=5000000000"
    (deployment,) = of_kind(rendered("--set", flags), "Deployment")
    (data,) = [
        one for one in deployment["spec"]["template"]["spec"]["volumes"] if one["name"] == "data"
    ]
    assert int(data["emptyDir"]["sizeLimit"]) > 5_000_000_000 + (16 << 30)
