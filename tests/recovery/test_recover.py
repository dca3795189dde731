"""`recover_`: never worse than before, the same again, and nothing else is touched."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ss_pruning import ImitationLoss, Recovery, SyntheticImages, compact_, load, prune_, recover_, save
from ss_pruning.errors import FileFormatError, InputError
from ss_pruning.importance.calibration import Batch
from ss_pruning.recovery.fidelity import HeldOut
from ss_pruning.recovery.training import Length, Training
from ss_pruning.recovery.views import another_view
from ss_pruning.sources.demo import digits_data, digits_resnet, digits_weights
from tests.support.attention import Block
from tests.support.snapshot import snapshot

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


class Whole(nn.Module):
    """Torch's own attention of a stream to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


@pytest.fixture(scope="module")
def images() -> Tensor:
    found: Tensor = digits_data("calibration").tensors[0]
    return found


@pytest.fixture(scope="module")
def nets(images: Tensor) -> tuple[nn.Module, nn.Module]:
    """The dense demo net, and what is left at a fifth of its work."""
    dense = digits_resnet()
    dense.load_state_dict(load_file(digits_weights()))
    pruned = copy.deepcopy(dense.eval())
    prune_(pruned, images[:1], macs=0.2, compensation="mean")
    return dense, pruned


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def output_error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = model(x), dense(x)
    return float(((ours - theirs) ** 2).sum() / ((theirs - theirs.mean()) ** 2).sum())


def test_where_nothing_was_lost_there_is_nothing_to_recover(images: Tensor) -> None:
    dense = digits_resnet()
    dense.load_state_dict(load_file(digits_weights()))
    pruned = copy.deepcopy(dense.eval())
    prune_(pruned, images[:1], macs=0.5, calibration=images)  # what training has emptied
    report = recover_(pruned, dense, images, steps=3)
    assert report.steps == 0
    assert any("there was nothing to recover" in note for note in report.notes), report.notes
    assert not any("no weights did better" in note for note in report.notes)


def held_out_of(images: Tensor, settings: Recovery) -> Tensor:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    hidden = images[order[: max(1, round(settings.held_out * len(images)))].sort().values]
    seen: Tensor = another_view(
        Batch.of(hidden), settings, torch.Generator().manual_seed(settings.seed)
    ).inputs
    return seen


def test_it_comes_closer_to_the_dense_model_on_images_it_has_not_seen(
    nets: tuple[nn.Module, nn.Module], images: Tensor
) -> None:
    dense, model = nets[0], copy.deepcopy(nets[1])
    test, labels = digits_data("test").tensors
    before = output_error(model, dense, test)
    right = (model(test).argmax(1) == labels).float().mean()
    report = recover_(model, dense, images, steps=60)
    assert output_error(model, dense, test) < 0.7 * before
    assert (model(test).argmax(1) == labels).float().mean() >= right
    assert report.stopped == "done"
    assert {"layer1", "layer2", "layer3"} <= set(report.places)
    assert (report.images, report.held_out, report.steps) == (160, 40, 60)
    assert "160 images" in str(report)


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 0.1, 1000.0])
@pytest.mark.parametrize(("count", "seed"), [(2, 0), (3, 1), (12, 2), (60, 3)])
def test_it_never_ends_worse_than_it_began(
    nets: tuple[nn.Module, nn.Module], images: Tensor, rate: float, count: int, seed: int
) -> None:
    dense, model = nets[0], copy.deepcopy(nets[1])
    settings = Recovery(rate=rate, seed=seed, batch=8)
    hidden = held_out_of(images[:count], settings)
    before = output_error(model, dense, hidden)
    report = recover_(model, dense, images[:count], steps=12, settings=settings)
    after = output_error(model, dense, hidden)
    assert after <= before * (1 + 1e-6)
    assert report.before.error == pytest.approx(before, rel=1e-4)
    assert report.after.error == pytest.approx(after, rel=1e-4)
    assert any("few" in note for note in report.notes) is (count < 100)


def test_the_same_seed_gives_the_same_weights(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    def recovered(seed: int) -> list[Tensor]:
        model = copy.deepcopy(nets[1])
        torch.rand(1)  # whatever was drawn before
        report = recover_(model, nets[0], images, steps=12, settings=Recovery(seed=seed))
        assert report.best_step
        return weights(model)

    first = recovered(0)
    assert same(first, recovered(0))
    assert not same(first, recovered(1))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7, 11])
def test_a_killed_training_goes_on_to_the_same_weights(
    nets: tuple[nn.Module, nn.Module], images: Tensor, tmp_path: Path, at: int
) -> None:
    settings, steps = Recovery(batch=16), 12
    whole = copy.deepcopy(nets[1])
    straight = recover_(whole, nets[0], images[:40], steps=steps, settings=settings)
    assert straight.best_step
    model = copy.deepcopy(nets[1])

    def dying(_: str, step: int, __: int) -> None:
        if step == at:
            raise KilledError

    file = tmp_path / "recovery.safetensors"
    options: dict[str, Any] = {"steps": steps, "settings": settings, "checkpoint": file}
    with pytest.raises(KilledError):
        recover_(model, nets[0], images[:40], progress=dying, **options)
    assert same(weights(model), weights(nets[1])), "an error leaves the model as it was"
    resumed: list[int] = []
    report = recover_(
        model, nets[0], images[:40], progress=lambda _, step, __: resumed.append(step), **options
    )
    assert resumed[0] == at, "it goes on from the last measurement, the step before"
    assert same(weights(model), weights(whole))
    assert report.history == straight.history
    again = copy.deepcopy(nets[1])
    recover_(again, nets[0], images[:40], **options)
    assert same(weights(again), weights(whole)), "a file of a whole training gives its weights"


def test_a_checkpoint_of_something_else_is_refused(
    nets: tuple[nn.Module, nn.Module], images: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "recovery.safetensors"
    recover_(copy.deepcopy(nets[1]), nets[0], images[:20], steps=1, checkpoint=file)
    for other in ({"steps": 2}, {"steps": 1, "settings": Recovery(seed=1)}):
        with pytest.raises(InputError, match="belongs to a recovery of another model"):
            recover_(copy.deepcopy(nets[1]), nets[0], images[:20], checkpoint=file, **other)
    dense = copy.deepcopy(nets[0])
    with torch.no_grad():
        dense.fc.bias.add_(1.0)
    with pytest.raises(InputError, match="belongs to a recovery of another model"):
        recover_(copy.deepcopy(nets[1]), dense, images[:20], steps=1, checkpoint=file)
    less = copy.deepcopy(nets[1])
    less.conv1.weight.requires_grad_(False)
    with pytest.raises(InputError, match="belongs to a recovery of another model"):
        recover_(less, nets[0], images[:20], steps=1, checkpoint=file)
    file.unlink()
    recover_(less, nets[0], images[:20], steps=1, checkpoint=file)
    with pytest.raises(InputError, match="belongs to a recovery of another model"):
        recover_(copy.deepcopy(nets[1]), nets[0], images[:20], steps=1, checkpoint=file)


def test_images_that_gradients_were_asked_of(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    asked = images[:20].clone().requires_grad_()
    whole, model = copy.deepcopy(nets[1]), copy.deepcopy(nets[1])
    recover_(whole, nets[0], images[:20], steps=2)
    recover_(model, nets[0], asked * 1, steps=2)
    assert same(weights(model), weights(whole))
    assert asked.grad is None


def test_attention_that_lost_heads_is_recovered() -> None:
    """Its layers have names of their own then, which the dense model does not have."""
    torch.manual_seed(0)
    dense = Block(Whole()).eval()
    model, x = copy.deepcopy(dense), torch.randn(40, 3, 4, 6)
    prune_(model, x[:2], ratio=0.4, allocation="local")
    assert "attn.attention.q_proj.weight" in model.state_dict()
    before = snapshot(dense)
    report = recover_(model, dense, x, steps=4)
    assert report.after.error <= report.before.error
    assert snapshot(dense) == before


@pytest.mark.parametrize("damage", ["cut off", "a bit", "a tensor less", "a note", "depth"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    nets: tuple[nn.Module, nn.Module], images: Tensor, tmp_path: Path, damage: str
) -> None:
    """A bit that has turned over would end in the best weights, under a fidelity that they do not have."""
    file = tmp_path / "recovery.safetensors"
    recover_(copy.deepcopy(nets[1]), nets[0], images[:20], steps=1, checkpoint=file)
    content, tensors = bytearray(file.read_bytes()), load_file(file)
    with safe_open(file, "pt") as opened:
        ((key, note),) = opened.metadata().items()
    content[-30] ^= 0x40
    file.write_bytes({"cut off": content[:100], "a bit": content}.get(damage, content))
    if damage == "a tensor less":
        save_file({name: tensors[name] for name in sorted(tensors)[1:]}, file, {key: note})
    if damage == "a note":
        save_file(tensors, file, {key: json.dumps(json.loads(note) | {"best_step": 7})})
    if damage == "depth":
        save_file(tensors, file, {key: "[" * 100_000})
    model = copy.deepcopy(nets[1])
    before = snapshot(model)
    with pytest.raises(FileFormatError, match="damaged"):
        recover_(model, nets[0], images[:20], steps=1, checkpoint=file)
    assert snapshot(model) == before


def test_ctrl_c_leaves_the_best_weights_so_far(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model = copy.deepcopy(nets[1])

    def interrupt(_: str, step: int, __: int) -> None:
        if step == 12:
            raise KeyboardInterrupt

    settings = Recovery()
    report = recover_(model, nets[0], images, steps=40, settings=settings, progress=interrupt)
    assert report.best_step
    assert report.stopped == "interrupted"
    assert report.steps == 12
    hidden = held_out_of(images, settings)
    assert output_error(model, nets[0], hidden) == pytest.approx(report.after.error, rel=1e-4)


def test_nothing_but_weights_changes(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    """Identity of the parameters, flags, hooks, buffers, gradients, random state; and the dense model is left alone."""
    dense, model = copy.deepcopy(nets[0]).train(), copy.deepcopy(nets[1])
    model.train()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.register_forward_hook(lambda *_: None)
    before, theirs = snapshot(model), snapshot(dense)
    report = recover_(model, dense, images[:30], steps=6)
    assert report.best_step
    after = snapshot(model)
    assert snapshot(dense) == theirs
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    trained = {f"{name}: tensor" for name, _ in model.named_parameters()}
    assert changed <= trained
    assert not changed & {"conv1.weight: tensor", "fc.weight: tensor", "fc.bias: tensor"}
    for key in changed:  # identity, memory, type and flags; then values
        assert before[key][:5] == after[key][:5]
        assert before[key][6] == after[key][6]


def test_a_loss_that_is_no_number_ends_it(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model = copy.deepcopy(nets[1])
    settings = Recovery(rate=1000.0, weight_decay=1.0)
    report = recover_(model, nets[0], images, steps=100, settings=settings)
    assert report.stopped == "diverged"
    assert any("lower the rate" in note for note in report.notes)
    assert same(weights(model), weights(nets[1]))


def test_a_tensor_moves_in_proportion_to_its_size(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    """Adam's first step is as large as the rate says, for each element that has a gradient."""
    dense, model = nets[0], copy.deepcopy(nets[1])
    with ImitationLoss(model, dense, images[:1]) as imitation:
        held_out = HeldOut(imitation, Batch.of(images[:8]), 8)
        settings = Recovery(weight_decay=0.0)
        training = Training(imitation, Batch.of(images), held_out, settings, Length(1000, None))
        before = {name: weight.detach().clone() for name, weight in training.state.weights.items()}
        training._step()
        moved = {n: float((w.detach() - before[n]).abs().max()) for n, w in training.state.weights.items()}
    shares = [moved[n] / max(float(w.square().mean().sqrt()), 0.01) for n, w in before.items() if moved[n]]
    assert len(shares) > 10
    assert max(shares) < 1.01 * min(shares)


def first_move(dense: nn.Module, pruned: nn.Module, images: Tensor, length: Length) -> float:
    """How far the first step of such a training moves a tensor, as a share of its size."""
    model = copy.deepcopy(pruned)
    with ImitationLoss(model, dense, images[:1]) as imitation:
        held_out = HeldOut(imitation, Batch.of(images[:8]), 8)
        training = Training(imitation, Batch.of(images), held_out, Recovery(weight_decay=0.0), length)
        before = {name: weight.detach().clone() for name, weight in training.state.weights.items()}
        training._step()
        name = "layer1.0.conv1.weight"
        moved = (training.state.weights[name].detach() - before[name]).abs().max()
    return float(moved) / float(before[name].square().mean().sqrt())


def test_short_trainings_take_as_much_smaller_steps(
    nets: tuple[nn.Module, nn.Module], images: Tensor
) -> None:
    moves = {steps: first_move(*nets, images, Length(steps, None)) for steps in (50, 200, 400, 1000)}
    assert moves[50] == pytest.approx(moves[400] / 8, rel=0.05)
    assert moves[200] == pytest.approx(moves[400] / 2, rel=0.05)
    assert moves[1000] == pytest.approx(moves[400], rel=0.05)


def test_what_there_is_time_for() -> None:
    """As many images a step as let 200 steps fit, as many measurements as take a seventh of the time."""
    length = Length(None, 600.0)
    assert [length.batch(seconds) for seconds in (0.01, 1.0, 1.5, 3.0, 60.0)] == [64, 24, 16, 8, 8]
    assert [length.measurements(seconds) for seconds in (0.1, 9.0, 300.0)] == [20, 10, 4]
    assert Length(100, None).batch(60.0) == 64
    assert Length(100, None).measurements(60.0) == 20


def test_short_of_time_steps_are_of_few_images(
    nets: tuple[nn.Module, nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless their number was asked for."""
    counts: list[int] = []
    draw = Training._drawn

    def drawn(self: Training, generator: torch.Generator) -> Batch:
        batch = draw(self, generator)
        counts.append(len(batch))
        return batch

    monkeypatch.setattr(Training, "_drawn", drawn)
    recover_(copy.deepcopy(nets[1]), nets[0], images, minutes=0.01)
    assert counts[:2] == [8, 8]
    assert max(counts) < 64
    counts.clear()
    recover_(copy.deepcopy(nets[1]), nets[0], images, minutes=0.01, settings=Recovery(batch=24))
    assert set(counts) == {24}


@pytest.mark.parametrize("room", [0, 2**28])
def test_the_dense_model_runs_once_on_what_is_held_out(
    nets: tuple[nn.Module, nn.Module], images: Tensor, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its outputs find room; what is measured is the same."""
    monkeypatch.setattr("ss_pruning.recovery.fidelity._ROOM", room)
    dense, runs = nets[0], []
    with ImitationLoss(copy.deepcopy(nets[1]), dense, images[:1]) as imitation:
        held_out = HeldOut(imitation, Batch.of(images[:12]), 5)
        handle = imitation.dense.register_forward_hook(lambda *_: runs.append(1))
        found = [held_out.measure() for _ in range(3)]
        handle.remove()
    assert len(runs) == (0 if room else 9)
    assert found[0] == found[1] == found[2]
    with torch.no_grad():
        theirs, ours = dense(images[:12]), nets[1](images[:12])
    wanted = (ours - theirs).double().square().mean() / theirs.double().var(correction=0)
    assert found[0].error == pytest.approx(float(wanted), rel=1e-4)


def test_steps_that_are_too_large_are_taken_back(
    nets: tuple[nn.Module, nn.Module], images: Tensor, tmp_path: Path
) -> None:
    """A rate that spoils the model at first still ends with a better one, killed on the way or not."""
    settings, whole = Recovery(rate=14.0), copy.deepcopy(nets[1])
    report = recover_(whole, nets[0], images, steps=60, settings=settings)
    assert report.after.error < report.before.error
    assert any("too large" in note for note in report.notes)

    def kill(_: str, done: int, __: int) -> None:
        if done >= 20:
            raise KilledError

    model, file = copy.deepcopy(nets[1]), tmp_path / "checkpoint.safetensors"
    with pytest.raises(KilledError):
        recover_(model, nets[0], images, steps=60, settings=settings, checkpoint=file, progress=kill)
    recover_(model, nets[0], images, steps=60, settings=settings, checkpoint=file)
    assert same(weights(model), weights(whole))


@pytest.mark.parametrize(("factor", "turns"), [(1.9, 0), (2.1, 1)])
def test_a_loss_that_has_doubled_ends_a_road_at_once(
    nets: tuple[nn.Module, nn.Module], images: Tensor, factor: float, turns: int
) -> None:
    """The weights are the best ones again, before anything is measured."""
    model = copy.deepcopy(nets[1])
    with ImitationLoss(model, nets[0], images[:1]) as imitation:
        held_out = HeldOut(imitation, Batch.of(images[:8]), 8)
        training = Training(imitation, Batch.of(images), held_out, Recovery(rate=0.001), Length(1000, None))
        training._step()
        first = training.state.first_loss
        assert first == pytest.approx(float(training.losses[0]))
        assert any(not torch.equal(w, training.state.best[n]) for n, w in training.state.weights.items())
        training._step()
        training.state.first_loss = float(training.losses[1]) / factor
        training.state.step -= 1  # the same images, nearly the same loss
        training._step()
        same_again = all(torch.equal(w, training.state.best[n]) for n, w in training.state.weights.items())
    assert (training.state.turns, same_again) == (turns, bool(turns))


def test_batches_of_a_few_images_do_not_end_a_road(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    """Images that are hard are no steps that were too large: the rate came down to nothing."""
    model = copy.deepcopy(nets[1])
    report = recover_(model, nets[0], images, steps=60, settings=Recovery(batch=2, rate=0.01))
    assert not any("too large" in note for note in report.notes)
    assert report.after.error < 0.7 * report.before.error


def test_after_compaction(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    """Kernels pruned without repair, their channels cut: what is gone is what recovery makes up for."""
    dense, model = nets[0], copy.deepcopy(nets[0])
    with torch.no_grad():
        for block in (*model.layer1, *model.layer2):
            block.conv1.weight[::2] = 0.0
    compact_(model, images[:1])
    report = recover_(model, dense, images[:60], steps=8)
    assert report.after.error < report.before.error


def test_without_any_image(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model = copy.deepcopy(nets[1])
    made = SyntheticImages(images=32, steps=5)
    report = recover_(model, nets[0], made, example_inputs=images[:1], steps=8)
    assert report.images + report.held_out == 32
    with pytest.raises(InputError, match="example_inputs="):
        recover_(model, nets[0], "synthetic", steps=1)


def test_minutes_end_it(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model, calls = copy.deepcopy(nets[1]), []
    report = recover_(model, nets[0], images, minutes=0.02, progress=lambda *call: calls.append(call))
    assert report.stopped == "done"
    assert report.seconds == pytest.approx(1.2, abs=1.0)
    assert calls[-1] == ("recover", 1, 1)


def test_loaders_and_mixed_precision(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    model = copy.deepcopy(nets[1])
    loader = torch.utils.data.DataLoader(digits_data("calibration"), batch_size=50)
    report = recover_(model, nets[0], loader, steps=5, settings=Recovery(dtype="bfloat16"))
    assert report.images == 160
    assert all(math.isfinite(m.loss) for m in report.history)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Detector(nn.Module):
    """Returns as many boxes as it finds: outputs of two models have no common shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.head(self.body(x)).flatten(2).transpose(1, 2).flatten(0, 1)
        return {"boxes": found[found[:, 0] > 0], "scores": found.sum(1)}


def test_a_detector_is_measured_by_its_feature_maps() -> None:
    torch.manual_seed(0)
    dense = Detector().eval()
    model, x = copy.deepcopy(dense), torch.randn(24, 3, 12, 12)
    prune_(model, x[:1], ratio=0.4)
    report = recover_(model, dense, x, steps=20)
    assert report.before.agreement is None
    assert 0 < report.after.error < report.before.error < 2
    with torch.no_grad():
        hidden = held_out_of(x, Recovery())
        ours, theirs = model.body(hidden), dense.body(hidden)
    assert ours.shape[1] < theirs.shape[1]


class Built(nn.Module):
    """Makes its classifier when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        seen = self.body(x).mean((2, 3))
        if self.head is None:
            self.head = nn.Linear(seen.shape[1], 4)
        scores: Tensor = self.head(seen)
        return scores


class Pairs(nn.Module):
    """Takes two images at once, and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Detector().body

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.body(x.view(2, 3, 12, 12))
        return maps.mean((2, 3))


def test_a_model_of_one_batch_size_needs_examples() -> None:
    model, x = Pairs().eval(), torch.randn(13, 3, 12, 12)
    dense = copy.deepcopy(model)
    prune_(model, x[:2], ratio=0.4)
    with pytest.raises(InputError, match="example_inputs= where it takes just so many at once"):
        recover_(model, dense, x, steps=1)
    report = recover_(model, dense, x, example_inputs=x[:2], steps=6)
    assert report.images + report.held_out == 12
    assert report.after.error <= report.before.error


def test_what_is_made_in_the_first_pass_is_refused() -> None:
    model, x = Built().eval(), torch.randn(8, 3, 8, 8)
    dense = copy.deepcopy(model)
    prune_(model, x[:1], ratio=0.4)
    before = snapshot(model)
    with pytest.raises(InputError, match=r"'head\.bias' is made in the first forward pass"):
        recover_(model, dense, x, steps=1)
    assert snapshot(model) == before


def test_a_traced_graph_is_recovered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch.fx.symbolic_trace(Detector().body).eval()
    model, x = copy.deepcopy(dense), torch.randn(24, 3, 12, 12)
    prune_(model, x[:1], ratio=0.3)
    prune_(model, x[:1], ratio=0.3)
    report = recover_(model, dense, x, steps=8)
    assert report.after.error < report.before.error
    save(model, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", lambda: copy.deepcopy(dense))
    assert torch.equal(again(x), model(x))


def test_bad_input_is_refused_before_any_work(nets: tuple[nn.Module, nn.Module], images: Tensor) -> None:
    dense, pruned = nets
    before = weights(pruned)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((pruned, other, images), {}, "dense is not the model that was pruned"),
        ((pruned, pruned, images), {}, "dense is not the model that was pruned"),
        ((dense, copy.deepcopy(dense), images), {}, "the model was not pruned"),
        ((copy.deepcopy(dense), other, images), {}, "carries no plan"),
        ((pruned, dense, torch.zeros(8, 3, 8, 8)), {}, "does not run on these images"),
        ((pruned, dense, images[:1]), {}, "Expect little of fewer than 100"),
        ((pruned, dense, images[:0]), {}, "empty"),
        ((pruned, dense, "photos"), {}, "'photos' is unknown"),
        ((pruned, dense, torch.full((4, 1, 8, 8), math.nan)), {}, "NaN or Inf"),
        ((pruned, dense, images), {"steps": 0}, "steps=0"),
        ((pruned, dense, images), {"minutes": math.nan}, "minutes=nan"),
        ((pruned, dense, images), {"minutes": math.inf}, "minutes=inf"),
        ((pruned, dense, images), {"settings": {"rate": 0.1}}, "settings={'rate': 0.1} are none"),
        ((pruned, dense, images), {"progress": True}, "progress=True cannot be called"),
        (
            (copy.deepcopy(pruned).double(), dense, images),
            {},
            "is torch.float64 in the model, torch.float32 in dense",
        ),
        (
            (copy.deepcopy(pruned).half(), copy.deepcopy(dense).half(), images.half()),
            {},
            "float16, in which Adam",
        ),
        ((pruned, dense, images), {"checkpoint": "/nowhere/there"}, "does not exist"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            recover_(*arguments, **options)
    frozen = copy.deepcopy(pruned).requires_grad_(False)
    with pytest.raises(InputError, match="no parameter may be trained"):
        recover_(frozen, dense, images)
    frozen.fc.requires_grad_(True)
    with pytest.raises(InputError, match="reaches the feature maps"):
        recover_(frozen, dense, images, steps=1)
    assert same(before, weights(pruned))


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"rate": -1}, {"batch": 0}, {"seed": 0.5}, {"dtype": "float16"}, {"held_out": 1}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Recovery(**wrong)
