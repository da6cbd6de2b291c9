"""The main job on real weights and real photographs: `make demo`, or `python -m demo`.

Two experts (DINOv2 ViT-S/14, EfficientNet-Lite0) are cached once, a proxy learns from both caches, the proxy is cached,
and a ViT-T learns from the proxy's cache alone. Then student and proxy are judged on photographs and digits that they
never trained on. Every step is a command that you could type; a step that is done already is a cache hit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.assets import AssetError, prepare_assets

ASSETS = Path("assets")
OUT = Path("demo-out")
PHOTOS, DIGITS = ASSETS / "photos", ASSETS / "digits"
DINOV2 = ASSETS / "weights" / "dinov2-small"
EFFICIENTNET = ASSETS / "weights" / "efficientnet_lite0" / "model.safetensors"
VIEWS = "--views rrc:12"
PROXY_ARCH, STUDENT_ARCH = "vit_small_patch16_dinov3_qkvb", "vit_tiny_patch16_dinov3_qkvb"
TRAINING = "--size 112 --batch-size 32 --head-width 1024 --holdout 0.15"

EXTRACTIONS = {
    "dinov2": f"--teacher dinov2 --weights {DINOV2} --corpus {PHOTOS} {VIEWS} --size 112",
    "efficientnet": f"--teacher efficientnet-lite0 --weights {EFFICIENTNET} --corpus {PHOTOS} {VIEWS} --size 224",
    "proxy": f"--teacher {OUT}/runs/proxy --corpus {PHOTOS} {VIEWS} --size 112",
    "digits": f"--teacher dinov2 --weights {DINOV2} --corpus {DIGITS} --size 112 --tokens summary",
}

console = Console(highlight=False, width=max(Console().width, 110))


def main() -> None:
    """Run every step, then show what came of them."""
    began = time.monotonic()
    console.rule("real weights and real photographs")
    try:
        prepare_assets(ASSETS)
    except AssetError as error:
        sys.exit(f"error: {error}")
    stores = {name: extract(name) for name in ("dinov2", "efficientnet")}
    runs = {"proxy": train("proxy", PROXY_ARCH, ["dinov2", "efficientnet"], steps=140)}
    stores["proxy"] = extract("proxy")
    runs["student"] = train("student", STUDENT_ARCH, ["proxy"], steps=60)
    extract("digits")
    changed = not all(report["cached"] for report in [*stores.values(), *runs.values()])
    agreements = {name: judge(f"eval agreement {OUT}/runs/{name}", changed=changed) for name in runs}
    accuracies = {"DINOv2-S": judge(f"eval knn {OUT}/store/digits.zarr", changed=changed)}
    for name in runs:
        accuracies[name] = judge(f"eval knn {OUT}/runs/{name} --corpus {DIGITS}", changed=changed)
    weights = f"--weights dinov2={DINOV2} --weights efficientnet-lite0={EFFICIENTNET}"
    models = f"dinov2 efficientnet-lite0 {OUT}/runs/proxy {OUT}/runs/student"
    judge(f"viz {models} {weights} --images {PHOTOS} --out {OUT}/page.html", changed=changed)
    show(stores, runs, agreements, accuracies)
    console.print(
        f"{time.monotonic() - began:.0f} s in all; look at [bold]{(OUT / 'page.html').resolve()}[/]", soft_wrap=True
    )


def extract(name: str) -> dict[str, Any]:
    """Cache one teacher."""
    return eupe(f"extract {EXTRACTIONS[name]} --out {OUT}/store/{name}.zarr")


def train(name: str, arch: str, targets: list[str], *, steps: int) -> dict[str, Any]:
    """Distil stores into a run; one that was stopped goes on."""
    run = OUT / "runs" / name
    resume = "--resume" if (run / "config.json").exists() else ""
    flags = " ".join(f"--targets {OUT}/store/{target}.zarr" for target in targets)
    return eupe(f"train {flags} --student {arch} --out {run} {TRAINING} --steps {steps} {resume}".strip())


def judge(command: str, *, changed: bool) -> dict[str, Any]:
    """A report that is kept while the stores and runs that it judges stay what they are."""
    kept = OUT / "reports" / f"{hashlib.sha256(command.encode()).hexdigest()[:16]}.json"
    if changed or not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(eupe(command)))
    report: dict[str, Any] = json.loads(kept.read_text())
    return report


def eupe(command: str) -> dict[str, Any]:
    """Show and run one command; its JSON report."""
    console.print(f"\n[bold]$ eupe {command}[/]", soft_wrap=True)
    done = subprocess.run(
        [sys.executable, "-m", "eupe", *shlex.split(command), "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def show(
    stores: dict[str, dict[str, Any]],
    runs: dict[str, dict[str, Any]],
    agreements: dict[str, dict[str, Any]],
    accuracies: dict[str, dict[str, Any]],
) -> None:
    """The closing tables."""
    console.print()
    table = Table("store", "views", "MB", "of raw fp16", "views/s", "where", title="What was cached", box=None)
    for name, r in stores.items():
        rate = "cache hit" if r["cached"] else f"{r['views_per_s']:.0f}"
        share = f"{r['stored_bytes'] / r['raw_bytes']:.0%}"
        table.add_row(
            name, str(r["num_views"]), f"{r['stored_bytes'] / 1e6:.1f}", share, rate, os.path.relpath(r["store"])
        )
    console.print(table)
    table = Table("run", "steps", "images/s", "data-wait", "where", title="\nWhat was trained", box=None)
    for name, r in runs.items():
        table.add_row(name, str(r["steps"]), f"{r['images_per_s']:.0f}", f"{r['data_wait']:.1%}", r["run"])
    console.print(table)
    names = ("run", "target", "tokens", "cosine", "mean feature", "untrained", "normalised", "untrained")
    table = Table(*names, title="\nAgreement on held-out pictures", box=None)
    for name, report in agreements.items():
        for target in report["targets"]:
            for kind, a in target["kinds"].items():
                raw = (a["cosine"], a["cosine_mean"], a["cosine_untrained"])
                numbers = (*raw, a["normalised_cosine"], a["normalised_untrained"])
                table.add_row(name, target["target"], kind, *(f"{x:.3f}" for x in numbers))
    console.print(table)
    table = Table("summaries of", "accuracy", "untrained", "commonest digit", title="\nk-NN on unseen digits", box=None)
    for name, r in accuracies.items():
        untrained = "" if r["untrained"] is None else f"{r['untrained']:.1%}"
        table.add_row(name, f"{r['accuracy']:.1%}", untrained, f"{r['majority']:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
