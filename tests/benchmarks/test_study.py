"""The study's bookkeeping: names that tell runs apart, what is computed of scores, and a page that types nothing in."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.data.cifar import as_input
from benchmarks.sparse_training import page as study_page
from benchmarks.sparse_training import run as study
from benchmarks.sparse_training.paper import CRITERIA, NETS, Training, scores, taylor

SCORES = {
    "strength": {"a": torch.tensor([[4.0, 3.0], [2.0, 1.0]])},
    "kernel norm": {"a": torch.tensor([[4.0, 1.0], [2.0, 3.0]])},
}


def test_every_point_of_the_study_has_a_name_of_its_own() -> None:
    every = [job for part in study.PARTS for seed in (0, 1) for job in study.jobs(part, seed)]
    names = [study.name_of(job, point) for job in every for point in (None, *job.points)]
    assert len(names) == len(set(names))
    job = every[0]
    for changed in (
        replace(job.training, weight=0.5),
        replace(job.training, width=0.3, form="share", weight=0.5),
    ):
        assert study.name_of(replace(job, training=changed), None) not in names


def test_overlap_is_the_share_of_ours_that_others_keep_too() -> None:
    assert study.overlaps(SCORES, 0.5) == {"strength": 1.0, "kernel norm": 0.5}


def test_entropy_ranks_single_synapses_as_variance_does_and_sums_otherwise() -> None:
    # Summed over outputs, column 0 delivers more variance (16.01 against 8), column 1 more entropy.
    found = study.entropy_agreement({"a": torch.tensor([[4.0, 2.0], [0.1, 2.0]])})
    assert found == {"synapses": pytest.approx(1.0), "channels": pytest.approx(-1.0)}
    assert study.rank_correlation(
        torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 4])
    ) == pytest.approx(0.8)


def test_scores_of_all_criteria_fit_the_layers_and_taylor_matches_loops() -> None:
    torch.manual_seed(0)
    model = NETS["vgg16bn"](0.0625).eval()
    labelled = torch.randint(255, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (4,))
    for criterion in CRITERIA:
        found = scores(model, criterion, labelled, seed=0)
        assert "0" not in found
        for path, score in found.items():
            assert score.shape == model.get_submodule(path).weight.shape[:2]
    first = next(iter(found))
    score = taylor(model, (first,), labelled)[first]
    torch.nn.functional.cross_entropy(model(as_input(labelled[0])), labelled[1]).backward()
    weight = model.get_submodule(first).weight
    for k in range(3):
        for c in range(3):
            term = sum(
                float(weight[k, c, i, j].detach() * weight.grad[k, c, i, j])
                for i in range(3)
                for j in range(3)
            )
            assert score[k, c].item() == pytest.approx(term**2, rel=1e-3, abs=1e-12)


def line(part: str, seed: int, training: Training, **values: Any) -> dict[str, Any]:
    training = replace(training, recipe=replace(training.recipe, seed=seed))
    return {"part": part, "name": f"{part}{seed}{sorted(values.items())}", **asdict(training), "held_out": False,
            "versions": {"torch": "9"}, **values}  # fmt: skip


def test_the_page_shows_what_the_lines_say(tmp_path: Path) -> None:
    net, width, (asked, *_) = study.NETS["vgg"]
    dense = Training(net, width)
    ours = replace(dense, weight=study.WEIGHT)
    lines = []
    for seed in range(3):
        at = {"epochs": study.TUNING_EPOCHS, "sparsity": 0.0, "criterion": "strength"}
        lines += [
            line("vgg", seed, dense, top1=81.5 + seed),
            line("vgg", seed, dense, top1=81.5, top1_tuned=82.0 + seed, **at),
            line("vgg", seed, ours, top1=10.0, top1_tuned=81.5 + seed, **{**at, "sparsity": asked}),
            line("vgg", seed, dense, top1=10.0, top1_tuned=70.0 + seed,
                 **{**at, "sparsity": asked, "criterion": "kernel norm"}),
            line("vgg", seed, dense, top1_tuned=80.0, **{**at, "epochs": 1}),
            line("vgg", seed, ours, top1_tuned=79.0, **{**at, "epochs": 1, "sparsity": asked}),
        ]  # fmt: skip
    text = study_page.make_page(lines, tmp_path / "study.md").read_text()
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("|")}
    assert "83.00 ± 1.00 | +0.50 | 0 |" in rows["dense, fine-tuned as long"]
    assert f"{asked:.0%} | 82.50 ± 1.00 | +0.00 | -0.50 |" in text
    assert "71.00 ± 1.00 | -11.50 | -12.00 |" in rows[f"without, kernel norm, {study.TUNING_EPOCHS} epochs"]
    assert f"within 1 point, mean over seeds: **{asked:.0%}**" in text
    assert "not run" in rows[f"without, random, {study.TUNING_EPOCHS} epochs"]
    assert f"With 1 epochs of fine-tuning instead, for both: 79.00 ± 0.00 at {asked:.0%}, -1.00." in text
    assert "torch 9" in text
