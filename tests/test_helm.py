"""The Helm chart: what it makes of values, and which values it refuses. `tests.deploy_check` lints it."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.deploy_check import CHART, DEPLOY, VALUES, rendered_chart, tool
from tests.service import ROOT

HELM = tool("helm")
WITH_PODS = {"Deployment", "StatefulSet"}
pytestmark = pytest.mark.skipif(HELM is None, reason="helm is not installed")


def rendered(values: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Objects by kind and what they are for."""
    assert HELM is not None
    made: list[dict[str, Any]] = rendered_chart(HELM, DEPLOY / "helm" / "values" / f"{values}.yaml")
    return {(item["kind"], item["metadata"]["name"].removeprefix("test-clasp-search")): item for item in made}


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (["api.replicas=2"], "SQLite"),
        (["api.autoscaling.enabled=true"], "SQLite"),
        (["worker.autoscaling.kind=keda"], "mode=scaled"),
        (["mode=scaled"], "replicas cannot share a SQLite file"),
        (["mode=scaled", "database.existingSecret=a"], "S3 store"),
        (["apiKeys.existingSecret="], "wants a key"),
        (["ingress.enabled=true", "ingress.host=a.b"], "networkPolicy.from"),
        (["mode=large"], "mode"),
        (["api.replica=2"], "replica"),
        (["settings.PATH=x"], "PATH"),
    ],
)
def test_a_mistake_is_told_before_anything_is_installed(mistake: list[str], told: str) -> None:
    """Two replicas on one SQLite file, or a worker that cannot read what a replica received, would start and
    then lose things; a misspelt value would be nothing."""
    chosen = [argument for value in mistake for argument in ("--set", value)]
    done = subprocess.run(
        [str(HELM), "template", "test", CHART, "--set", "apiKeys.existingSecret=clasp", *chosen],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert told in done.stderr


@pytest.mark.parametrize("values", [path.stem for path in VALUES])
def test_pods_can_do_little(values: str) -> None:
    """As in docker-compose.yml: no root, nothing to write to but /data and /tmp, no key to the cluster."""
    made = rendered(values)
    pods = [item["spec"]["template"]["spec"] for (kind, _), item in made.items() if kind in WITH_PODS]
    assert pods
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/data"}
        assert container["livenessProbe"]
        names = [variable["name"] for variable in container["env"]]
        assert len(names) == len(set(names))
        secret = [
            variable for variable in container["env"] if re.search("KEY|TOKEN|DATABASE", variable["name"])
        ]
        assert all("valueFrom" in variable for variable in secret)


def test_many_follow_the_queue_and_end_in_time() -> None:
    """Replicas are exchanged one by one, each with the time that its end takes; workers come with the age of
    the queue, by a metric that there is."""
    made = rendered("scaled")
    api = made["Deployment", "-api"]["spec"]
    assert api["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    pod = api["template"]["spec"]
    said = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    assert said["CLASP_WORKERS"] == "0"
    assert pod["terminationGracePeriodSeconds"] >= int(said["CLASP_DRAIN_S"]) + 30
    assert ("PodDisruptionBudget", "-api") in made
    (trigger,) = made["ScaledObject", "-worker"]["spec"]["triggers"]
    (metric,) = re.findall(r"clasp_\w+", trigger["metadata"]["query"])
    (external,) = rendered("scaled-gpu")["HorizontalPodAutoscaler", "-worker"]["spec"]["metrics"]
    assert metric == external["external"]["metric"]["name"]
    assert f"`{metric}`" in (ROOT / "docs" / "operations.md").read_text()


def test_a_machine_has_one_pod_and_a_volume() -> None:
    """SQLite and FAISS are files of one process and its workers."""
    made = rendered("single")
    state = made["StatefulSet", "-api"]["spec"]
    assert state["replicas"] == 1
    assert state["volumeClaimTemplates"][0]["metadata"]["name"] == "data"
    assert ("Deployment", "-worker") not in made


def test_the_chart_has_the_one_file_of_alerts() -> None:
    """Two would differ by the second change."""
    rules = rendered("scaled")["PrometheusRule", ""]["spec"]
    assert rules == yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    assert (CHART / "alerts.yml").resolve() == (DEPLOY / "alerts.yml").resolve()


def test_settings_that_the_chart_names_exist() -> None:
    """A setting that is misspelt in a deployment is silently not there."""
    known = {f"CLASP_{name.upper()}" for name in Settings.model_fields}
    for path in sorted((CHART / "templates").iterdir()):
        assert set(re.findall(r"- name: (CLASP_[A-Z0-9_]+)", path.read_text())) <= known, path
