"""What is shipped for clusters is what Ray takes, and its commands are eupe's."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typed import parsed

from eupe.common.storage import StoragePath
from eupe.corpus.views import parse_views
from eupe.extract.actors import Node, place_workers
from eupe.teachers.registry import REGISTRY

ROOT = Path(__file__).parents[1]
LAUNCHER, RAYJOB = ROOT / "deploy" / "ray-cluster.yaml", ROOT / "deploy" / "rayjob.yaml"
PAGE = ROOT / "docs" / "extract-at-scale.md"


def commands(text: str) -> list[str]:
    """Every `eupe ...` of a document, in comments, too; lines that end in a backslash are one."""
    plain = re.sub(r"\\\n[#\s]*", "", text)
    return [found.strip() for found in re.findall(r"(?:^|-- |> )(eupe [a-z].*)$", plain, re.MULTILINE)]


def launcher() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(LAUNCHER.read_text())
    return config


def rayjob() -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load(RAYJOB.read_text())
    return manifest


@pytest.mark.parametrize("path", [LAUNCHER, PAGE], ids=lambda path: path.name)
def test_every_command_is_one_of_eupe(path: Path) -> None:
    found = commands(path.read_text())
    assert found
    for command in found:
        assert_is_for_a_cluster(command)


def assert_is_for_a_cluster(command: str) -> None:
    """It parses, names a known teacher, and nothing in it depends on the folder that it is typed in."""
    given = parsed(command)
    if "teacher" not in given:
        return
    assert set(given["teacher"]) <= REGISTRY.keys()
    parse_views(given["views"], seed=0)
    for where in (given["corpus"], *given["out"]):
        assert not StoragePath.of(where).is_local or Path(where).is_absolute(), command


def test_the_cluster_launcher_takes_the_cluster() -> None:
    """Ray's own schema and checks, and a typing error in a key is found by them."""
    validate_config(prepare_config(launcher()))
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**launcher(), "max_worker": 4}))


def test_the_workers_of_the_submitted_job_fit_the_cluster() -> None:
    """One worker on each spot node with all of its cores, none on the head."""
    config = launcher()
    nodes = [
        Node.of(kind["resources"])
        for kind in config["available_node_types"].values()
        for _ in range(kind.get("min_workers", 1))
    ]
    (command,) = commands(LAUNCHER.read_text())
    assert place_workers(nodes, parsed(command)["workers"], None) == (4, 8, 1)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and "--num-cpus=0" in config["head_start_ray_commands"][-1]


def test_the_kubernetes_job_runs_one_worker_on_each_gpu() -> None:
    spec = rayjob()["spec"]
    assert_is_for_a_cluster(spec["entrypoint"])
    given = parsed(spec["entrypoint"])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert given["ray_address"] == "auto"
    assert given["workers"] == group["replicas"] == group["minReplicas"]
    pods = [group["template"], spec["rayClusterSpec"]["headGroupSpec"]["template"]]
    images = {container["image"] for pod in pods for container in pod["spec"]["containers"]}
    assert len(images) == 1, "workers import eupe, too"
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
