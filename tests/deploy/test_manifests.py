"""The files of deploy/ against what they are for: schemas, settings, and the metrics of a service."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bonsai_lora.cli.main import main
from bonsai_lora.settings import Settings

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
CRDS = Path(__file__).parent / "crds"
DASHBOARD = json.loads((DEPLOY / "grafana/bonsai-lora.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "grafana/alerts.yaml").read_text())
RUNTIME = DEPLOY / "kserve/runtime.yaml"
METRIC = re.compile(r"\b(?:bonsai_lora|process)_\w+")


def rules():
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def expressions():
    panels = [
        (panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]
    queries = [
        (one["name"], one["definition"])
        for one in DASHBOARD["templating"]["list"]
        if one["type"] == "query"
    ]
    return panels + queries + [(rule["alert"], rule["expr"]) for rule in rules()]


def validator(kind):
    return jsonschema.Draft7Validator(json.loads((CRDS / f"{kind}.json").read_text()))


def manifests(name):
    return list(yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", ["kserve/runtime", "kserve/inference-service", "ray/rayservice"])
def test_custom_resources_follow_the_schemas_of_their_kinds(name):
    manifest = manifests(name)[0]
    checked = validator(manifest["kind"])
    assert not list(checked.iter_errors(manifest))
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["autoselect"] = True
    assert [error.path[0] for error in checked.iter_errors(wrong)] == ["spec"]


def test_both_ways_to_ray_serve_the_same():
    """With KubeRay, and with `serve deploy`."""
    (service, _), (serve,) = manifests("ray/rayservice"), manifests("ray/serve")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == serve


def test_the_runtimes_command_line_is_understood(monkeypatch, capsys):
    """Every flag is known, and with an unknown one after them only that one is refused."""
    (container,) = yaml.safe_load(RUNTIME.read_text())["spec"]["containers"]
    with pytest.raises(SystemExit):
        main([*container["args"], "--no-such-flag"])
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_every_metric_of_the_dashboard_and_the_alerts_exists(client):
    names = set()
    for family in text_string_to_metric_families(client.get("/metrics").text):
        ending = {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")
        names.add(family.name + ending)
    used = {name for _, text in expressions() for name in METRIC.findall(text)}
    assert used
    assert used <= names


def test_the_dashboard_works_with_any_data_source():
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert "$__rate_interval" in target["expr"] or "rate(" not in target["expr"]
            assert panel["fieldConfig"]["defaults"]["unit"]
    boxes = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    taken = [(x, y) for box in boxes for x, y in cells(box)]
    assert len(taken) == len(set(taken)), "panels overlap"


def cells(box):
    return [
        (x, y)
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]


def test_every_code_and_status_in_an_alert_is_one_that_is_answered():
    documented = (ROOT / "docs/errors.md").read_text()
    for rule in rules():
        for code in re.findall(r'code="(\w+)"', rule["expr"]):
            assert f"`{code}`" in documented
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_chart_sets_only_variables_that_are_settings():
    template = (DEPLOY / "helm/bonsai-lora/templates/deployment.yaml").read_text()
    named = set(re.findall(r"name: BONSAI_LORA_([A-Z_]+)\b", template))
    assert {name.lower() for name in named} <= set(Settings.model_fields)
    schema = json.loads((DEPLOY / "helm/bonsai-lora/values.schema.json").read_text())
    taken = set(schema["properties"]["settings"]["propertyNames"]["not"]["enum"])
    assert {name.lower() for name in named} <= taken, "a value would set the variable twice"
