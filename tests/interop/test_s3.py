"""Pictures, store and training through a bucket of a real S3 server, against the same on a disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from making import TINY_STUDENT, make_corpus, make_store, tiny_config
from object_store import S3Server, download, objects, upload
from shared_ray import running_ray

from eupe.common.storage import StoragePath
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError
from eupe.store import Store, open_store
from eupe.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]

Run = Callable[..., Any]

SIZE = 160
VIEWS = ViewSpec(policy="rrc", num_views=8)
"""With 32 pictures: two parts."""


@pytest.fixture(scope="module")
def ray_address(warm_python: str, s3_server: S3Server) -> Iterator[str]:
    """Yield the address of a Ray whose workers find the S3 server, as those of a user's Ray find the user's."""
    with running_ray(warm_python, {"RAY_AUTH_MODE": "disabled", **os.environ, **s3_server.variables}) as address:
        yield address


def content(store: Store) -> dict[str, bytes]:
    """All objects but those that name the place of the pictures."""
    return {name: data for name, data in objects(store.path).items() if not re.match(r"zarr\.json$|corpus/", name)}


def test_an_extraction_on_ray_from_bucket_to_bucket(
    s3: S3Server, tmp_path: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    """Equal to that of one process on a disk, and resumed at the part whose commit is gone."""
    photos = make_corpus(tmp_path / "photos", count=32)
    upload(photos, s3.bucket / "photos")
    local = make_store(tmp_path / "local.zarr", photos, tiny_weights, views=VIEWS, sizes=(SIZE,))
    out = s3.bucket / "store/x.zarr"
    words = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights, "--corpus", f"{s3.bucket}/photos"]
    words += ["--out", out, "--size", SIZE, "--views", "rrc:8", "--dtype", "fp32", "--batch-size", 8, "--json"]
    first = run_eupe(*words)
    assert first.code == 0, first.err
    report = json.loads(first.out)
    assert (report["store"], report["num_samples"], report["num_failed"]) == (str(out), 32, 0)
    store = open_store(out)
    assert store.spec.num_parts == 2
    assert store.spec.corpus["root"] == f"{s3.bucket}/photos"
    assert content(store) == content(local)
    info = json.loads(run_eupe("store", "info", out, "--json").out)
    assert (info["finished"], info["failed"]) == (True, {})

    before = objects(out)
    out.delete("parts/00001.parquet")
    assert not open_store(out).finished
    s3.forget()
    again = run_eupe(*words)
    assert again.code == 0, again.err
    assert not json.loads(again.out)["cached"]
    written = [asked.key for asked in s3.served("PUT", "/c/")]
    assert written and all("/c/1/" in key for key in written)
    assert objects(out) == before

    s3.forget()
    assert json.loads(run_eupe(*words).out)["cached"]
    assert not s3.served("PUT")


def test_a_server_that_is_away_for_longer_is_waited_for(
    s3: S3Server, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store, run_eupe: Run
) -> None:
    """Nine refusals are more than the seven tries of one request: parts fail, in writing and in reading."""
    photos = upload(tiny_corpus, s3.bucket / "photos")
    words = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights, "--size", 64, "--views", "rrc:2"]
    words += ["--dtype", "fp32", "--batch-size", 8, "--json", "--out", s3.bucket / "x.zarr", "--corpus"]
    index = tmp_path / "index.parquet"
    assert run_eupe("index", "--corpus", photos, "--out", index).code == 0
    s3.fail(503, "SlowDown", method="PUT", key="/dense/c/", times=9)
    s3.fail(503, "SlowDown", method="GET", key="photos/class0/0000", times=9)
    outcome = run_eupe(*words, index)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["num_failed"] == 0
    assert [len([a for a in s3.asked if a.status == 503 and a.method == m]) for m in ("PUT", "GET")] == [9, 9]
    assert content(open_store(s3.bucket / "x.zarr")) == content(tiny_store)


def trained(targets: Store | Path, out: Path, corpus: StoragePath | None = None) -> list[tuple[object, object]]:
    """Every loss and validation of a short run."""
    config = tiny_config(
        targets.path if isinstance(targets, Store) else targets, out, corpus=corpus, steps=6, log_every=1
    )
    train(config)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line.get("loss"), line.get("validation")) for line in logged]


def test_training_from_a_bucket_is_training_from_a_disk(
    s3: S3Server, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store
) -> None:
    photos = upload(tiny_corpus, s3.bucket / "photos")
    store = make_store(s3.bucket / "store/x.zarr", photos, tiny_weights)
    assert content(store) == content(tiny_store)
    s3.forget()
    from_bucket = trained(store, tmp_path / "bucket")
    assert len([loss for loss, _ in from_bucket if loss is not None]) == 6
    shards = s3.served("GET", "/dense/c/")
    assert shards and all(asked.status == 206 for asked in shards)
    assert s3.served("GET", r"photos/.*\.png$")
    copy = download(store.path, tmp_path / "copy.zarr")
    with pytest.raises(ConfigError, match=f"to allow reading that bucket, give --corpus {photos}"):
        trained(copy, tmp_path / "disk")
    assert trained(copy, tmp_path / "disk", photos) == from_bucket
    assert trained(tiny_store, tmp_path / "local") == from_bucket


def test_a_run_from_a_bucket_is_judged_from_there(
    s3: S3Server, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    photos = upload(tiny_corpus, s3.bucket / "photos")
    store = make_store(s3.bucket / "x.zarr", photos, tiny_weights)
    words = ["train", "--targets", store.path, "--student", TINY_STUDENT, "--out", tmp_path / "run", "--steps", 2]
    words += ["--batch-size", 8, "--head-width", 32, "--holdout", 0.3, "--dtype", "fp32"]
    outcome = run_eupe(*words)
    assert outcome.code == 0, outcome.err
    verified = run_eupe("store", "verify", store.path)
    assert verified.code == 0, verified.err
    agreement = run_eupe("eval", "agreement", tmp_path / "run", "--json")
    assert agreement.code == 0, agreement.err
    (by_store,) = json.loads(run_eupe("eval", "knn", store.path, "--k", 3, "--json").out)["results"]
    assert by_store["data"]["val"] == 48
    by_run = run_eupe("eval", "knn", tmp_path / "run", "--data", photos, "--k", 3, "--size", 64, "--json")
    assert by_run.code == 0, by_run.err
    assert json.loads(by_run.out)["results"][0]["data"]["val"] == 24
    page = run_eupe("viz", store.path, tmp_path / "run", "--images", photos, "--out", tmp_path / "page.html", "--json")
    assert page.code == 0, page.err
    assert json.loads(page.out)["models"] == ["x.zarr", "run"]

    photos.delete(next(name for name in photos.list() if name.endswith(".png")))
    gone = run_eupe(*words[:5], "--out", tmp_path / "other", *words[7:], "--steps", 500)
    assert gone.code == 2
    assert "has stored features, but cannot be read now" in " ".join(gone.err.split())


def test_a_run_is_made_on_a_disk_only(run_eupe: Run) -> None:
    outcome = run_eupe("train", "--targets", "x.zarr", "--student", TINY_STUDENT, "--out", "s3://bucket/run")
    assert (outcome.code, outcome.err) == (2, "error: --out must be a local folder, got s3://bucket/run\n")
