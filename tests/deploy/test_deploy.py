"""Dashboard, alerts and autoscalers name metrics and labels that the code exports, in queries that parse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import promql_parser
import pytest
import yaml
from deployed import documents

from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.stats import ENDS, REFUSALS
from triton_repo.runtime.reporting.metrics import DEFINITIONS
from trt_build.ort.routing import Routing

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "moeship.rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "moeship.json"
CASES = Path(__file__).with_name("alert_cases.yml")
# Labels that Prometheus itself, or its operator, adds to all that it reads from a server.
ADDED = {"job", "instance", "namespace", "pod"}
OWN = {
    "moeship_requests_ended_total": {"end"},
    "moeship_requests_refused_total": {"reason"},
    "moeship_expert_tokens_total": {"layer", "expert"},
}
LABELS = {
    name: {"model", *ADDED, *OWN.get(definition.name, ()), *(["le"] if name.endswith("_bucket") else [])}
    for definition in DEFINITIONS
    for name in definition.names
} | {"up": ADDED, "nv_trt_llm_request_metrics": {"model", "version", "request_type", *ADDED}}

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_BUILT_IN = {"__rate_interval": "5m", "__all": ""}


def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text("utf-8"))


def rules() -> list[dict]:
    [group] = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return group["rules"]


def panels() -> list[dict]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Every query of rules, dashboard and autoscalers, with values for the dashboard's variables."""
    found = [rule["expr"] for rule in rules()]
    found += [target["expr"] for panel in panels() for target in panel["targets"]]
    found += [note["expr"] for note in dashboard()["annotations"]["list"]]
    found += autoscaling()
    return [_VARIABLE.sub(lambda match: _BUILT_IN.get(match[1] or match[2], "a"), query) for query in found]


def autoscaling() -> list[str]:
    """The queries by which KEDA and KServe count servers."""
    [scaled] = documents("kubernetes/components/keda/scaledobject.yaml")
    [overlay] = documents("kubernetes/overlays/tensorrt-llm/kustomization.yaml")
    [patch] = [entry["patch"] for entry in overlay["patches"] if entry["target"]["kind"] == "ScaledObject"]
    _, service, _ = documents("kserve/moeship.yaml")
    [metric] = service["spec"]["predictor"]["autoScaling"]["metrics"]
    return [
        scaled["spec"]["triggers"][0]["metadata"]["query"],
        *(step["value"] for step in yaml.safe_load(patch) if step["path"].endswith("/query")),
        metric["external"]["metric"]["query"],
    ]


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """The metrics of a query, each with the labels that it is selected by."""
    found: list = []

    def visit(node) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(query), pre_visit=visit)
    return found


@pytest.mark.parametrize("query", queries())
def test_a_query_parses_and_names_metrics_and_labels_that_are_exported(query):
    found = selectors(query)
    assert found
    unknown = [(name, labels) for name, labels in found if not labels <= LABELS.get(name, set())]
    assert unknown == []
    known = set().union(*(LABELS[name] for name, _ in found))
    grouped = {label.strip() for text in re.findall(r"(?:by|on) \(([^)]*)\)", query) for label in text.split(",")}
    assert grouped <= known


def test_a_query_that_names_something_else_is_noticed():
    assert selectors('sum(rate(moeship_step_total{modell="a"}[5m]))') == [("moeship_step_total", {"modell"})]
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql_parser.parse("sum(rate(moeship_steps_total[5m])")


def test_the_dashboard_shows_every_metric():
    shown = {name for query in queries()[len(rules()) : -len(autoscaling())] for name, _ in selectors(query)}
    assert [definition.name for definition in DEFINITIONS if not shown & set(definition.names)] == []


def test_labels_are_those_of_the_definitions(timed_engine):
    found = {name: {label for label, _ in labels} for definition in DEFINITIONS
             for name, labels, _ in definition.readings(timed_engine)}  # fmt: skip
    assert found == {name: labels - ADDED - {"model"} for name, labels in LABELS.items() if name.startswith("moeship_")}


@pytest.fixture
def timed_engine() -> SequenceEngine:
    """An engine that has experts and has done nothing."""
    cache = SimpleNamespace(num_slots=1, positions=1, lengths=[0], bytes_of=lambda positions: positions)
    routing = Routing(layers=(0,), expert_order=(0, 1), experts_per_token=1)
    return SequenceEngine(SimpleNamespace(), cache, Slots(cache, 1), num_tokens=1, routing=routing)


def test_variables_of_the_dashboard_are_defined():
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = {first or second for first, second in _VARIABLE.findall(DASHBOARD.read_text("utf-8"))}
    assert used - set(_BUILT_IN) == defined


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    every = dashboard()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    for one, other in combinations([panel["gridPos"] for panel in every], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in every)


def test_settings_of_panels_are_where_grafana_reads_them():
    """Grafana ignores what it does not know, such as `defaults` within `defaults`."""
    known = {"unit", "min", "max", "decimals", "noValue", "mappings", "thresholds", "color", "custom"}
    assert [panel["title"] for panel in panels() if not set(panel["fieldConfig"]["defaults"]) <= known] == []


def test_alerts_say_how_bad_it_is_and_what_to_do():
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) == 9
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} == set(rule["annotations"])
    cases = yaml.safe_load(CASES.read_text("utf-8"))["tests"]
    tests = [test for case in cases for test in case["promql_expr_test"]]
    tried = [sample["labels"] for test in tests for sample in test.get("exp_samples", [])]
    assert tried == [f'{{alertname="{name}"}}' for name in names]


def test_alerts_fire_for_their_cases_and_for_no_others():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    run = subprocess.run([promtool, "test", "rules", CASES.name], cwd=CASES.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def table(heading: str) -> list[list[str]]:
    """The rows, cell by cell, of the table in docs/operations.md whose first heading this is."""
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    rows = text.partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def test_the_page_for_operators_has_every_metric_as_it_is_exported():
    expected = []
    for definition in DEFINITIONS:
        labels = sorted(OWN.get(definition.name, ()), reverse=True)
        expected.append([definition.name, definition.kind, "`, `".join(labels), definition.help])
    assert table("metric") == expected


def test_the_page_for_operators_has_every_end_reason_and_alert():
    assert [row[0] for row in table("`end`")] == list(ENDS)
    assert [row[0] for row in table("`reason`")] == list(REFUSALS)
    assert [row[0] for row in table("alert")] == [rule["alert"] for rule in rules()]
