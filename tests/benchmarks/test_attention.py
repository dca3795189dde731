"""The rivals on nets with attention: closed forms against least squares written out, and budgets that are met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

from benchmarks.accuracy.attention import closed_form
from benchmarks.accuracy.attention.closed_form import Moments, narrow_attention, predicted, prune_uniformly
from benchmarks.accuracy.attention.page import write, write_summary
from benchmarks.accuracy.attention.ways import OutOfReachError
from benchmarks.data.attention_nets import ATTENTION_NETS, ConvSwin, vit
from ss_pruning.profiling.macs import count_macs


def moments(rows: Tensor) -> Moments:
    return Moments(len(rows), rows.sum(0), rows.T @ rows)


def test_what_goes_is_predicted_by_ridge_regression() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 6).double() @ torch.randn(6, 6).double() + torch.randn(6).double()
    kept, gone = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4])
    b, c = predicted(moments(rows), kept, gone)
    read = rows[:, kept] - rows[:, kept].mean(0)
    ridge = closed_form.RIDGE * read.var(0, correction=0).mean() * len(rows)
    more = torch.cat([read, ridge.sqrt() * torch.eye(3).double()])
    wanted = torch.cat([rows[:, gone] - rows[:, gone].mean(0), torch.zeros(3, 3).double()])
    assert torch.allclose(b.T, torch.linalg.lstsq(more, wanted).solution)
    assert torch.allclose(c, rows[:, gone].mean(0) - b @ rows[:, kept].mean(0))


def test_logits_are_predicted_over_all_pairs_of_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "RIDGE", 0.0)
    torch.manual_seed(0)
    rows = torch.randn(20, 8).double() @ torch.randn(8, 8).double()
    q, k = (torch.tensor([0, 2]), torch.tensor([1, 3])), (torch.tensor([4, 5]), torch.tensor([6, 7]))
    design, wanted = [], []
    for a in rows:
        for b in rows:
            design.append(torch.outer(a[q[0]], b[k[0]]).flatten())
            wanted.append(a[q[1]] @ b[k[1]])
    m = torch.linalg.lstsq(torch.stack(design), torch.stack(wanted)[:, None]).solution.reshape(2, 2)
    assert torch.allclose(closed_form.logit_mix(moments(rows).second, q, k), m)


@pytest.mark.parametrize("make", [lambda: vit(24, 3, 1), lambda: ConvSwin(16, 2, (2, 2))])
def test_nothing_changes_where_nothing_goes(make: type[nn.Module]) -> None:
    """Shifted windows with their masks and relative positions, too."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before, found = model(x), closed_form._moments(model, x)
        for path, module in closed_form._parts(model):
            if hasattr(module, "qkv"):
                model.set_submodule(
                    path, narrow_attention(module, found[f"{path}.qkv"], found[f"{path}.proj"], 0.0)
                )
            else:
                closed_form.narrow_mlp_(module, found[f"{path}.fc2"], 0.0)
        assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", sorted(ATTENTION_NETS))
def test_the_budget_is_met(name: str, values: bool) -> None:
    torch.manual_seed(0)
    model, x = ATTENTION_NETS[name]().eval(), torch.randn(8, 3, 32, 32)
    dense = count_macs(model, x[:1])[0]
    share = 0.7 if name == "conv_tokens4" and not values else 0.5  # more of it is a stem, which stays
    small = prune_uniformly(model, share, x, values)
    assert share - 0.04 < count_macs(small, x[:1])[0] / dense <= share
    assert count_macs(model, x[:1])[0] == dense


def test_a_budget_below_what_stays_is_out_of_reach() -> None:
    with pytest.raises(OutOfReachError, match="5% of the multiply-accumulates"):
        prune_uniformly(vit(24, 3, 1), 0.05, torch.randn(4, 3, 32, 32))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters:UserWarning")
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", sorted(ATTENTION_NETS))
def test_torch_pruning_meets_the_budget(name: str, everywhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    magnitude = pytest.importorskip("benchmarks.accuracy.attention.magnitude")
    monkeypatch.setattr(magnitude, "_RATIOS", [0.2, 0.4, 0.6])
    torch.manual_seed(0)
    model, x = ATTENTION_NETS[name]().eval(), torch.randn(2, 3, 32, 32)
    small = magnitude.prune_by_magnitude(model, 0.6, x[:1], everywhere)
    assert 0.3 < count_macs(small, x[:1])[0] / count_macs(model, x[:1])[0] <= 0.6
    assert small(x).shape == (2, 10)


def test_the_page_says_how_far_ours_is_ahead(tmp_path: Path) -> None:
    common = {
        "net": "vit6",
        "macs": 0.5,
        "split": "test",
        "dense": 80.0,
        "images": 10_000,
        "params_kept": 0.5,
    }
    common |= {"macs_kept": 0.5, "seconds": 3.0, "heads": [6, 3], "versions": {"torch": "2"}}
    tops = {
        "reconstruct": (70.0, 72.0, 74.0),
        "closed form": (60.0, 61.0, 62.0),
        "magnitude, global": (66.5,),
    }
    lines = [
        {**common, "way": way, "seed": i, "top1": t} for way, each in tops.items() for i, t in enumerate(each)
    ]
    lines.append({**common, "way": "reconstruct", "seed": 0, "top1": 1.0, "split": "train"})
    (tmp_path / "trained.json").write_text(
        json.dumps({"vit6": {"recipe": {"epochs": 3}, "cpu_seconds": 600, "parameters": 1000}})
    )
    text = write(lines, tmp_path / "page.md", tmp_path / "trained.json").read_text()
    assert "`reconstruct` loses 8.0 points. It is 11.0 points ahead of the closed form" in text
    assert "5.5 points ahead of the best of the others (Torch-Pruning, magnitude, global)" in text
    assert "The aim was 3 points.\n" in text  # the best of the others is far below the dense net
    assert "72.00 ± 2.00" in text
    assert "3 epochs in 10 CPU-minutes" in text
    (tmp_path / "how.md").write_text("# How\n<!-- attention -->\nold\n<!-- /attention -->\n")
    told = write_summary(lines, tmp_path / "how.md").read_text()
    assert "| `vit6` | 50% | 80.0 |  |  |  | 72.0 | 66.5 (Torch-Pruning, magnitude, global) |" in told
    assert "old" not in told
