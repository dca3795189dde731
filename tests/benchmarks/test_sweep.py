"""The sweep with Ray: killed and taken up again on a cluster, with the numbers of a run without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own imports
    pytest.importorskip("ray.tune", reason="an optional extra: pip install 'ss-pruning[sweep]'")
    from benchmarks.sparse_training import sweep, sweep_page
from benchmarks.sparse_training import paper
from tests.examples.test_paper import like_fashion_mnist

ROOT = Path(__file__).resolve().parents[2]
COMMON = (
    "--net",
    "vgg16bn",
    "--width",
    "0.0625",
    "--epochs",
    "2",
    "--finetune-epochs",
    "1",
    "--finetune-rate",
    "0.05",
)
GRID = ("--weights", "0", "1e-3", "--sparsities", "0.5", "0.8", "--criteria", "strength", "random")


def row(weight: float, criterion: str, sparsity: float, top1: float) -> dict[str, Any]:
    return {
        "weight": weight,
        "criterion": criterion,
        "sparsity": sparsity,
        "top1": {"trained": 90.0, "pruned": 20.0, "fine-tuned": top1, "compacted": top1},
        "before": {"macs": 100, "params": 50},
        "after": {"macs": 61, "params": 9},
    }


ROWS = [
    row(weight, criterion, sparsity, top1 - sparsity)
    for weight in (0.0, 1e-3)
    for criterion, top1 in (("strength", 80), ("random", 70))
    for sparsity in (0.9, 0.5)
]


def test_the_table_says_what_the_rows_say(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.show(ROWS)
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines()]
    assert ["0.001", "strength", "90%", "90.00", "20.00", "79.10", "0.610", "0.180"] in lines
    assert sum(len(line) == 8 for line in lines) == len(ROWS)


def test_the_plot_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="part of the extra")
    for name in ("a.svg", "b.svg"):
        sweep.plot(ROWS, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert all(text in drawn for text in ("penalty 0.001", "random", "not pruned"))
    assert drawn == (tmp_path / "b.svg").read_text()


def test_the_page_says_what_the_rows_say_and_leaves_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="part of the extra")
    page = tmp_path / "sweeps.md"
    page.write_text("before <!-- sweep -->\nold\n<!-- /sweep --> after")
    options = {"net": "vgg16bn", "width": 0.125, "dataset": "cifar10", "images": 5000, "epochs": 4}
    result = {"options": {**options, "finetune_epochs": 1}, "rows": ROWS, "versions": {"torch": "2"}}
    text = sweep_page.make_page(result, page).read_text()
    assert "| 0.001 | strength | 90% | 90.00 | 20.00 | 79.10 | 0.610 | 0.180 |" in text
    assert "vgg16bn at width 0.125 on cifar10, 4 epochs on 5,000 images, 1 of fine-tuning" in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "old" not in text
    assert (tmp_path / "sweep.svg").is_file()
    page.write_text("no place for it")
    with pytest.raises(SystemExit, match="lacks the markers"):
        sweep_page.make_page(result, page)


def test_a_folder_holds_one_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it runs may change, what is swept may not."""
    options = sweep.arguments(["--out", str(tmp_path)])
    sweep.check_recipe(options)
    sweep.check_recipe(sweep.arguments(["--out", str(tmp_path), "--address", "auto", "--cpus", "2"]))
    assert sweep.main(["--out", str(tmp_path), "--sparsities", "0.3"]) == 2
    assert "holds a sweep with other options" in capsys.readouterr().err


def test_missing_images_are_named_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err
    assert not sweep.ray.is_initialized()


def test_nothing_is_reported_to_rays_makers() -> None:
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@contextlib.contextmanager
def cluster(environment: dict[str, str]) -> Iterator[str]:
    """The address of a cluster of one machine, with two CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ("start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false")
    command = [sys.executable, "-m", "ray.scripts.scripts", *start, "--disable-usage-stats"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as head:
        try:
            assert head.stdout is not None
            assert any("Ray runtime started" in line for line in head.stdout)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_it_goes_on_on_a_cluster(tmp_path: Path) -> None:
    """Killed without warning with trials done and trials running; then taken up by the cluster's address."""
    psutil = pytest.importorskip("psutil", reason="tells which processes are left")
    data, out = like_fashion_mnist(tmp_path / "data"), tmp_path / "out"
    same = ("--data", str(data), *COMMON)
    command = [sys.executable, "-m", "benchmarks.sparse_training.sweep", *same, *GRID, "--images", "0",
               "--batch", "128", "--out", str(out), "--at-a-time", "2"]  # fmt: skip
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while len(done := list(out.glob("results/*.json"))) < 2 and run.poll() is None:
        time.sleep(0.02)
    assert run.poll() is None, "it ended before two trials had"
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=60)
    for left in alive:  # some of Ray's agents outlive the process that started them
        left.kill()
    before = {path: path.read_bytes() for path in done}
    stamps = {path: path.stat().st_mtime_ns for path in (*done, *out.glob("nets/*/strength*.pt"))}
    assert 2 <= len(before) < 8

    with cluster(environment) as address:
        again = subprocess.run([*command, "--address", address], cwd=ROOT, env=environment, capture_output=True,
                               text=True, check=False)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "nets: going on" in again.stdout
    assert "pruned: going on" in again.stdout
    assert {path: path.read_bytes() for path in done} == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # nothing that was done is done again
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [(row["weight"], row["criterion"], row["sparsity"]) for row in rows] == [
        (weight, criterion, sparsity)
        for weight in (0.0, 1e-3) for criterion in ("strength", "random") for sparsity in (0.5, 0.8)
    ]  # fmt: skip
    assert (out / "sweep.svg").read_text().count("penalty") == 2

    one = ("--weight", "1e-3", "--criterion", "random", "--sparsity", "0.8", "--no-bf16")
    plain = ("--dataset", "fashion-mnist", "--out", str(tmp_path / "plain"))
    assert paper.main([*same, *one, *plain]) == 0
    (path,) = (tmp_path / "plain").glob("*/*.json")
    assert json.loads(path.read_text())["top1"] == rows[-1]["top1"]
