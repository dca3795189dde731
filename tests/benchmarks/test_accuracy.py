"""The benchmark of accuracy: a run goes on where it was killed, and its page says what the lines say."""

from __future__ import annotations

import copy
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.accuracy import criteria as accuracy_criteria
from benchmarks.accuracy import page as accuracy_page
from benchmarks.accuracy import readme
from benchmarks.accuracy import run as accuracy
from benchmarks.accuracy.cells import accuracy_table, cells
from benchmarks.accuracy.criteria import OURS
from benchmarks.common import MISSING, add_line, made_on, read_lines
from benchmarks.data.models import CHECKPOINTS, cifar_resnet


def line(criterion: str, top1: float, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "net": "resnet20",
        "macs": 0.7,
        "criterion": criterion,
        "cost_exponent": 0.5,
        "compensation": "none",
        "seed": 0,
        "calibration": "none",
        "residual": False,
        "finetune": 0,
        "split": "test",
        "images": 10_000,
        "code": "abc",
        "dense": 91.73,
        "macs_kept": 0.699,
        "top1": top1,
        "versions": {"torch": "2"},
    }
    return values | changes


def test_an_unfinished_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    first = line("LAMP", 50.0)
    add_line(first, path)
    with path.open("a") as file:
        file.write('{"net": "resn')
    assert read_lines(path) == [first]
    add_line(line("LAMP", 51.0), path)
    assert [entry["top1"] for entry in read_lines(path)] == [50.0, 51.0]


def options(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["accuracy", "--nets", "resnet20", "--macs", "0.7", *words])
    return accuracy.arguments()


def test_re_estimated_norms_are_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--criteria", OURS, "--compensations", "none", "--seeds", "2")
    plain, anew = (
        list(accuracy.grid(options(monkeypatch, *words, *more)))
        for more in (("--calibration", "none"), ("--recalibrate",))
    )
    assert [(run.seed, run.calibration) for run in plain] == [(0, "none")]
    assert [(run.seed, run.calibration) for run in anew] == [(0, "real"), (1, "real")]
    assert plain[0].code() != anew[0].code()
    old = line(OURS, 59.0, cost_exponent=0.75)
    assert accuracy.key(old)[:-1] == tuple(vars(plain[0]).values())
    table = accuracy_table([old, line(OURS, 70.0, recalibrate=True, calibration="real")]).splitlines()
    assert table[0] == "| criterion | none | none, images, norms moved |"
    assert "59.00 | 70.00¹" in table[2]


def test_images_go_to_whom_they_are_of_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("--compensations", "none", "mean", "linear", "--cost-exponents", "0", "--seeds", "1")
    words = ("--criteria", OURS, "LAMP", *methods)

    def given(*more: str) -> list[str]:
        return [run.calibration for run in accuracy.grid(options(monkeypatch, *words, *more))]

    assert given() == ["real", "real", "real", "none", "none", "real"]
    assert given("--calibration", "real") == ["real", "real", "real", "none", "real", "real"]
    assert given("--calibration", "synthetic")[3:] == ["none", "synthetic", "synthetic"]
    with pytest.raises(SystemExit):
        given("--calibration", "none")
    assert "linear needs images" in capsys.readouterr().err


def test_a_plain_cut_that_has_no_use_for_images_stands_beside_one_that_has() -> None:
    images = {"calibration": "real", "cost_exponent": 1.0, "scope": "sensitivity"}
    lines = [line(OURS, 60.0), line("LAMP", 61.0), line("Random", 20.0), line("Random", 22.0, seed=1)]
    lines += [line(OURS, 70.0 + seed, seed=seed, **images) for seed in range(3)]
    lines += [line("LAMP", 64.0, compensation="mean", calibration="real", recalibrate=True)]
    assert accuracy_table(lines).splitlines() == [
        "| criterion | none | none, images | mean, images |",
        "|---|---:|---:|---:|",
        "| Random | 21.00 ± 1.41² | 21.00 ± 1.41² |  |",
        "| LAMP | **61.00** | 61.00 | 64.00¹ |",
        f"| {OURS} | 60.00 | **71.00 ± 1.00** |  |",
        f"| *{OURS} to the best* | -1.00, not within | best |  |",
    ]


def test_what_no_seed_can_change_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (
        "--criteria",
        "LAMP",
        "Random",
        "--cost-exponents",
        "0",
        "--compensations",
        "none",
        "reconstruct",
    )
    runs = [(r.criterion, r.compensation, r.seed) for r in accuracy.grid(options(monkeypatch, *chosen))]
    assert [seed for *what, seed in runs if what == ["LAMP", "none"]] == [0]
    for what in (["LAMP", "reconstruct"], ["Random", "none"], ["Random", "reconstruct"]):
        assert [seed for *other, seed in runs if other == what] == [0, 1, 2]


def test_what_is_there_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[accuracy.Run] = []

    class FakeBench:
        def __init__(self, options: Any) -> None: ...

        def __call__(self, run: accuracy.Run) -> dict[str, Any]:
            done.append(run)
            return {"top1": 50.0}

    monkeypatch.setattr(accuracy, "Bench", FakeBench)
    path = str(tmp_path / "lines.jsonl")
    for criteria in (("LAMP",), ("LAMP", "FPGM")):
        words = ("--criteria", *criteria, "--cost-exponents", "0")
        options(monkeypatch, *words, "--compensations", "none", "--results", path)
        assert accuracy.main() == 0
    assert [run.criterion for run in done] == ["LAMP", "FPGM"]


def test_after_the_first_seed_only_the_better_cost_exponent_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[tuple[str, float, int]] = []

    class FakeBench:
        def __init__(self, options: Any) -> None: ...

        def __call__(self, run: accuracy.Run) -> dict[str, Any]:
            done.append((run.criterion, run.cost_exponent, run.seed))
            return {"top1": 50.0 + run.cost_exponent * (1 if run.criterion == "LAMP" else -1)}

    monkeypatch.setattr(accuracy, "Bench", FakeBench)
    words = ("--criteria", "LAMP", "FPGM", OURS, "--compensations", "reconstruct", "--better-only")
    options(monkeypatch, *words, "--results", str(tmp_path / "lines.jsonl"))
    assert accuracy.main() == 0
    first = [("LAMP", 0.0, 0), ("LAMP", 0.5, 0), ("FPGM", 0.0, 0), ("FPGM", 0.5, 0), (OURS, 1.0, 0)]
    others = [
        (name, weight, seed)
        for seed in (1, 2)
        for name, weight in (("LAMP", 0.5), ("FPGM", 0.0), (OURS, 1.0))
    ]
    assert done == first + others


def test_ours_is_what_is_done_by_default_and_names_ask_for_other_scopes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = (OURS, f"{OURS}:scope=global", "LAMP", "LAMP:scope=sensitivity")
    words = ("--criteria", *names, "--compensations", "none", "reconstruct", "--seeds", "1")
    runs = [
        (r.criterion, r.compensation, r.scope, r.cost_exponent)
        for r in accuracy.grid(options(monkeypatch, *words))
    ]
    assert runs == [
        (OURS, "none", "sensitivity", 1.0),
        (OURS, "reconstruct", "sensitivity", 1.0),
        (names[1], "none", "global", 0.75),
        (names[1], "reconstruct", "global", 0.5),
        *(
            ("LAMP", compensation, "global", e)
            for compensation in ("none", "reconstruct")
            for e in (0.0, 0.5)
        ),
        *(
            ("LAMP:scope=sensitivity", compensation, "sensitivity", 1.0)
            for compensation in ("none", "reconstruct")
        ),
    ]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    images = torch.randn(16, 3, 8, 8)
    net(images)
    dry = next(
        accuracy.grid(options(monkeypatch, *words, "--compensations", "none", "--calibration", "none"))
    )
    cases = [("none", None, dry.scope, dry.cost_exponent)]
    cases += [(compensation, images, *how) for _, compensation, *how in runs[:2]]
    assert cases[0][2:] == ("global", 0.75)
    for compensation, given, scope, exponent in cases:
        settings = accuracy.prune_(
            copy.deepcopy(net), images[:1], macs=0.8, compensation=compensation, calibration=given
        ).settings  # type: ignore[arg-type]
        assert (settings["scope"], settings["cost_exponent"]) == (scope, exponent)
    assert not accuracy_criteria.is_known("LAMP:conditional=1")


def test_the_page_compares_scores_and_scopes() -> None:
    names = (*accuracy_page.SCOPES,)
    lines = [
        line(name, 80.0 + i, compensation="reconstruct", calibration="real") for i, name in enumerate(names)
    ]
    found = accuracy_page.scopes(lines).splitlines()
    assert found[-1] == "| resnet20, 70% | " + " | ".join(f"{80 + i}.00¹" for i in range(4)) + " |"
    assert accuracy_page.scopes(lines[:1]) == ""


def test_gains_are_over_the_plain_cut_of_the_same_point() -> None:
    solved = {"compensation": "reconstruct", "calibration": "real"}
    lines = [
        line("LAMP", 40.0),
        line("LAMP", 50.0, cost_exponent=0.0),
        line("LAMP", 70.0, **solved),
        line("LAMP", 75.0, **solved, seed=1, macs=0.5),  # no plain cut to compare with
        line(OURS, 45.0),
        line(OURS, 90.0, **solved, cost_exponent=1.0, scope="sensitivity"),
    ]
    found = accuracy_page.gains(lines).splitlines()
    assert found[-2:] == [f"| {OURS} | +45.0 (1 runs) |", "| LAMP | +30.0 (1 runs) |"][::-1]


def test_the_code_counts_and_words_do_not() -> None:
    first = accuracy._without_words('def f(x):\n    """One."""\n    return x  # a\n')
    assert first == accuracy._without_words('def f(x):\n    """Two."""\n    return x\n')
    assert first != accuracy._without_words('def f(x):\n    """One."""\n    return -x\n')


def test_table_marks_the_best_and_tells_how_far_ours_is() -> None:
    lines = [line(OURS, 60.0), line("LAMP", 61.0)]
    for seed, (ours, others) in enumerate(((80.0, 80.5), (81.0, 81.5), (82.0, 82.5))):
        changes = {"compensation": "reconstruct", "calibration": "real", "seed": seed}
        lines += [line(OURS, ours, **changes), line("LAMP", others, **changes)]
    assert accuracy_table(lines).splitlines() == [
        "| criterion | none | reconstruct |",
        "|---|---:|---:|",
        "| LAMP | **61.00** | **81.50 ± 1.00** |",
        f"| {OURS} | 60.00 | 81.00 ± 1.00 |",
        f"| *{OURS} to the best* | -1.00, not within | -0.50, within |",
    ]


def test_other_criteria_get_the_better_of_two_weights() -> None:
    lines = [line("LAMP", 50.0, cost_exponent=0.0), line("LAMP", 55.0), line("FPGM", 52.0, cost_exponent=0.0)]
    assert cells([*lines, line("FPGM", 51.0)]) == {
        ("LAMP", "none"): [55.0],
        ("FPGM", "none"): [52.0],
    }
    seeds = [line("Random", 40.0, seed=seed, cost_exponent=0.0) for seed in range(2)]
    assert cells([*seeds, line("Random", 41.0)]) == {("Random", "none"): [40.0, 40.0]}


def test_fine_tuned_runs_have_a_column_of_their_own() -> None:
    lines = [line("LAMP", 50.0, finetune=1280, top1_finetuned=70.0 + seed, seed=seed) for seed in range(3)]
    assert cells(lines) == {
        ("LAMP", "none"): [50.0],
        ("LAMP", "none, then 1,280 images"): [70.0, 71.0, 72.0],
    }


def test_runs_that_were_tuned_count_before_it_where_there_is_no_other() -> None:
    tuned = {"finetune": 6400, "top1_finetuned": 80.0, "compensation": "reconstruct", "calibration": "real"}
    plain = tuned | {"finetune": 0}
    lines = [line("LAMP", 71.0, **plain), line("LAMP", 60.0, **tuned), line("LAMP", 73.0, **tuned, seed=1)]
    for found in (
        cells(lines),
        cells(readme.before_tuning(lines[::-1])),
    ):
        assert sorted(found["LAMP", "reconstruct"]) == [71.0, 73.0]


def test_page_counts_the_newest_line_and_names_unequal_budgets(tmp_path: Path) -> None:
    lines = [line("LAMP", 50.0), line("LAMP", 55.0, code="new")]
    lines += [line(OURS, 54.0, macs_kept=0.65, cost_exponent=0.75)]
    text = accuracy_page.make_page(lines, tmp_path / "docs" / "page.md").read_text()
    assert "**55.00**" in text
    assert "50.00" not in text
    assert f"off the budget: {OURS} keeps 65.0%" in text


def test_page_keeps_both_cost_weights_apart_and_says_where_seeds_are_missing(tmp_path: Path) -> None:
    lines = [line("LAMP", 55.0, cost_exponent=0.0), line("LAMP", 50.0)]
    lines += [line("LAMP", 80.0, compensation="reconstruct"), line("Random", 20.0)]
    text = accuracy_page.make_page(lines, tmp_path / "page.md").read_text()
    assert "| LAMP | **55.00** | 80.00¹ |" in text
    assert "| Random | 20.00¹ |" in text


def test_the_only_one_is_not_the_best() -> None:
    table = accuracy_table([line(OURS, 60.0)]).splitlines()
    assert table[2:] == [f"| {OURS} | 60.00 |", f"| *{OURS} to the best* | no other was run |"]


def test_page_has_a_plot_where_there_are_several_budgets(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    lines = [line("LAMP", 50.0), line("LAMP", 40.0, macs=0.5)]
    page = accuracy_page.make_page(lines, tmp_path / "page.md")
    assert "accuracy_resnet20.svg" in page.read_text()
    assert (tmp_path / "accuracy_resnet20.svg").read_text().startswith("<?xml")


def test_the_summary_leaves_out_what_lacks_seeds() -> None:
    solved = {"compensation": "reconstruct", "calibration": "real", "macs": 0.5}
    lines = [line(OURS, 80.0 + seed, seed=seed, **solved) for seed in range(3)]
    lines += [line("LAMP", 70.0 + seed, seed=seed, **solved) for seed in range(3)]
    lines += [line("FPGM", 90.0, **solved), line(OURS, 50.0, macs=0.5), line(OURS, 60.0)]
    assert accuracy_page.summary(lines).splitlines()[2:] == [
        "| resnet20, 50% | 91.73 | 50.00 |  | 81.00 ± 1.00 | 71.00 ± 1.00 (LAMP) |"
    ]


def test_gradients_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10)).eval()
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), torch.tensor([1, 0, 3, 9, 1])
    singles = []
    for pixels, label in zip(*images, strict=True):
        model.zero_grad()
        outputs = model(accuracy_criteria.as_input(pixels[None]))
        (outputs.logsumexp(1) - outputs[:, label]).sum().backward()
        assert model[0].weight.grad is not None
        singles.append(model[0].weight.grad.clone())
    stacked = torch.stack(singles)
    mean, squares = (
        accuracy_criteria._mean_gradients(model, images),
        accuracy_criteria._squares(model, images),
    )
    torch.testing.assert_close(mean["0.weight"], stacked.mean(0))
    torch.testing.assert_close(squares["0.weight"], stacked.square().mean(0))


def test_jobs_keep_the_seeds_of_a_criterion_together_and_start_with_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--criteria", "LAMP", "FPGM", "--cost-exponents", "0", "--compensations", "none", "reconstruct")
    chosen = options(monkeypatch, *words, "--jobs", "4")
    jobs = accuracy.jobs_of([(run, run.code()) for run in accuracy.grid(chosen)], chosen)
    found = [[(r.compensation, r.criterion, r.seed) for r, _ in job] for job in jobs]
    solved = [[("reconstruct", name, seed) for seed in (0, 1, 2)] for name in ("LAMP", "FPGM")]
    assert sorted(found[:2]) == sorted(solved)
    assert sorted(found[2:]) == [[("none", "FPGM", 0)], [("none", "LAMP", 0)]]


@pytest.mark.slow
def test_several_processes_do_what_one_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Real ones, on a few images and on no weights worth the name."""
    data = tiny_cifar(tmp_path)
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    found = []
    for jobs in ("1", "2"):
        path = tmp_path / f"{jobs}.jsonl"
        words = ("--criteria", "Magnitude L2", "LAMP", "--cost-exponents", "0", "--compensations", "none")
        more = ("--images", "10", "--data", str(data), "--results", str(path), "--jobs", jobs)
        options(monkeypatch, *words, *more)
        assert accuracy.main() == 0
        found.append(sorted((row["criterion"], row["top1"], row["code"]) for row in read_lines(path)))
    assert len(found[0]) == 2
    assert found[0] == found[1]


def tiny_cifar(root: Path) -> Path:
    """Two images of noise a class and split, and a net of the right shape."""
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in map(str, range(10)):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = chance.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (root / "data" / "pretrained").mkdir(parents=True)
    with tarfile.open(root / "data" / "cifar10-png.tar", "w") as archive:
        archive.add(root / "images", arcname=".")
    state = {f"module.{key}": value for key, value in cifar_resnet("resnet20").state_dict().items()}
    torch.save({"state_dict": state}, root / "data" / "pretrained" / CHECKPOINTS["resnet20"])
    return root / "data"


def test_more_images_than_there_are_are_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int, int]] = []

    def record(model: nn.Module, images: Any, sgd: Any, schedule: Any, recipe: Any, epoch: int) -> None:
        passes.append((len(images[0]), epoch, recipe.epochs))

    monkeypatch.setattr(accuracy, "train_epoch", record)
    images = torch.zeros(300, 3, 32, 32, dtype=torch.uint8), torch.zeros(300, dtype=torch.long)
    for count in (200, 600):
        accuracy.finetune(nn.Linear(2, 2), images, count, seed=0)
    assert passes == [(200, 0, 1), (300, 0, 2), (300, 1, 2)]


def test_a_weight_of_costs_can_be_named_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{OURS}:cost_exponent=0.25"
    (run,) = accuracy.grid(
        options(monkeypatch, "--criteria", name, "--compensations", "none", "--calibration", "none")
    )
    assert (run.cost_exponent, run.scope) == (0.25, "global")
    assert not accuracy_criteria.is_known("LAMP:cost_exponent=0.25")


def test_pages_tell_the_machines() -> None:
    gpu = {"device": "cuda", "name": "Loom", "threads": "-", "torch": "2"}
    lines = [line("LAMP", 1.0), line("FPGM", 1.0, machine=gpu, versions={"torch": "3", "nni": MISSING})]
    assert made_on([*lines, lines[1]]) == "on one Loom: torch 3; on a CPU: torch 2"


def test_norms_that_are_not_as_by_default_have_tables_of_their_own(tmp_path: Path) -> None:
    today = {"cost_exponent": 0.75}
    lines = [
        line(OURS, 50.0, **today),
        line(OURS, 60.0, compensation="mean", recalibrate=True, **today),
        line(OURS, 55.0, compensation="mean"),
        line("LAMP", 54.0, compensation="mean"),
        line(OURS, 58.0, recalibrate=True),
    ]
    main, _, others = (
        accuracy_page.make_page(lines, tmp_path / "page.md")
        .read_text()
        .partition("## Norms left as they were")
    )
    assert f"| {OURS} | 50.00 | 60.00 |" in main
    assert "norms left |" not in main
    assert "| criterion | none, norms moved | mean, norms left |" in others
    assert f"| {OURS} | 58.00 | **55.00** |" in others


def test_variants_on_training_images_have_a_table_of_their_own(tmp_path: Path) -> None:
    tried = [
        line("LAMP", 60.0, split="train"),
        line(f"{OURS}:reduce=max,cost_exponent=0.25", 61.0, split="train", cost_exponent=0.25),
        line(OURS, 62.0, split="train", cost_exponent=0.75),
        line(OURS, 63.0, split="train", cost_exponent=0.75, compensation="mean"),
        line(
            OURS,
            64.0,
            split="train",
            cost_exponent=0.75,
            compensation="mean",
            recalibrate=True,
            scope="sensitivity",
        ),
        line(
            f"{OURS}:scope=global",
            65.0,
            split="train",
            cost_exponent=0.75,
            compensation="mean",
            recalibrate=True,
        ),
        line(
            f"{OURS}:scope=sensitivity",
            66.0,
            split="train",
            cost_exponent=0.75,
            scope="sensitivity",
        ),
    ]
    newest = line(OURS, 50.0, cost_exponent=0.75)
    text = accuracy_page.make_page([newest, *tried], tmp_path / "page.md").read_text()
    table = text.partition("what was tried")[2].strip().splitlines()[-5:]
    assert table[0] == "| scores | cost exponent | resnet20, 70%, none | resnet20, 70%, mean, norms left |"
    assert table[2:] == [
        f"| {OURS} | 0.75 | 62.0 | 63.0 |",
        "| LAMP | 0.5 | 60.0 |  |",
        f"| {OURS}, reduce=max | 0.25 | 61.0 |  |",
    ]


def test_defaults_of_the_past_are_not_todays(tmp_path: Path) -> None:
    today = {"compensation": "mean", "recalibrate": True, "cost_exponent": 0.75, "scope": "global"}
    lines = [line("LAMP", 50.0), line(OURS, 40.0, **today)]
    lines += [
        line(OURS, 60.0, **today | {"scope": "sensitivity"}),
        line(OURS, 70.0, **today | {"cost_exponent": 1.0}),
    ]
    text = accuracy_page.make_page(lines, tmp_path / "page.md").read_text()
    assert f"| {OURS} |  | 40.00 |" in text
    assert "60.00" not in text
    assert "70.00" not in text
    assert cells(readme.before_tuning(lines))[OURS, "mean"] == [40.0]


def test_longer_tuning_comes_later() -> None:
    many, few = (line(OURS, 60.0, finetune=n, top1_finetuned=61.0) for n in (100_000, 6_400))
    heads = accuracy_table([many, few]).splitlines()[0]
    assert heads.endswith("| none, then 6,400 images | none, then 100,000 images |")
