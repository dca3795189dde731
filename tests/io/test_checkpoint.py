"""Saved models: exact, versioned, and refused with our own words when anything is wrong with them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import FileFormatError, InputError, PlanError, SSPruningError
from ss_pruning.integrations.torch_pruning.pruner import GraphPruner
from ss_pruning.io.checkpoint import _Content, architecture_of, load, save
from ss_pruning.io.torch_pruning_history import plan_of
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan
from tests.support.zoo import BY_NAME

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Small(nn.Module):
    """The net of the fixtures: files that older versions wrote need it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.body(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Small().eval()
    ss_pruning.prune_(model, X, ratio=0.25)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit, plan included."""
    a, b = one.state_dict(), other.state_dict()
    return (
        getattr(one, PLAN_ATTRIBUTE, None) == getattr(other, PLAN_ATTRIBUTE, None)
        and list(a) == list(b)
        and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, nn.Module]:
    path, model = tmp_path_factory.mktemp("files") / "model.safetensors", pruned()
    save(model, path)
    return path.read_bytes(), model


# ---------------------------------------------------------------- versions and repeated pruning


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_every_format_load(version: int) -> None:
    model = load(FIXTURES / f"format{version}.safetensors", Small)
    run = load_file(FIXTURES / f"format{version}_run.safetensors")
    torch.testing.assert_close(model(run["x"]), run["y"])
    with safe_open(str(FIXTURES / f"format{version}.safetensors"), framework="pt") as file:
        assert json.loads(file.metadata()["ss_pruning"])["format"] == version


def test_a_newer_format_is_refused(original: tuple[bytes, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="has format 3; this version reads up to 2"):
        load(changed(original[0], tmp_path, lambda note: note.update(format=3)), Small)


def test_pruned_twice_is_one_plan_and_loads(tmp_path: Path) -> None:
    model = pruned()
    first = model.ss_pruning_plan
    save(model, tmp_path / "once.safetensors")
    again = load(tmp_path / "once.safetensors", Small)
    second = ss_pruning.prune_(again, X, ratio=0.25)
    assert again.ss_pruning_plan != first
    assert second.params_after < sum(p.numel() for p in model.parameters())
    save(again, tmp_path / "twice.safetensors")
    loaded = load(tmp_path / "twice.safetensors", Small)
    assert same(loaded, again)
    assert torch.equal(loaded(X), again(X))
    widths = {(cut.path, cut.side): cut.width for cut in loaded.ss_pruning_plan.cuts}
    assert widths["stem", "out"] == 8  # as the dense model has it: one plan, from the beginning


# ---------------------------------------------------------------- mutated files


def changed(
    content: bytes, folder: Path, change: Callable[[dict[str, Any]], object], seal: bool = False
) -> Path:
    """A copy of the file with another note; `seal` gives it the checksum that goes with it."""
    source, target = folder / "original.safetensors", folder / "changed.safetensors"
    source.write_bytes(content)
    with safe_open(str(source), framework="pt") as file:
        note = json.loads(file.metadata()["ss_pruning"])
    tensors = load_file(source)
    change(note)
    if seal:
        note["sha256"] = _Content(note["architecture"], note["plan"], tensors).checksum()
    save_file(tensors, str(target), metadata={"ss_pruning": json.dumps(note)})
    return target


def flipped(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    # Half of them where the header is: most bytes of a file are weights.
    end = 8 + struct.unpack("<Q", content[:8])[0] if chance.random() < 0.5 else len(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(data)


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def extended(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 64))


def spliced(content: bytes, chance: random.Random) -> bytes:
    start, length = chance.randrange(len(content)), chance.randrange(1, 256)
    return content[:start] + chance.randbytes(chance.randrange(256)) + content[start + length :]


def sized(content: bytes, chance: random.Random) -> bytes:
    """The header claims another length."""
    return (
        struct.pack("<Q", chance.choice((0, 1, 2**31, 2**63, 2**64 - 1, chance.randrange(9999))))
        + content[8:]
    )


def renoted(content: bytes, chance: random.Random) -> bytes:
    """Valid JSON, valid tensors, another word or number in the note."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    note = json.loads(header["__metadata__"]["ss_pruning"])
    plan = json.loads(note["plan"])
    kind = chance.randrange(5)
    if kind == 0:
        note[chance.choice(list(note))] = chance.choice(
            (None, -1, 1, 1e300, [], {}, "", "timm:resnet18", True)
        )
    elif kind == 1:
        note.pop(chance.choice(list(note)))
    elif kind == 2:
        cut = chance.choice(plan["cuts"])
        cut[chance.choice(list(cut))] = chance.choice(
            (None, -1, 10**12, [], [0, 0], [10**9], "x", "out", 1.5)
        )
        note["plan"] = json.dumps(plan)
    elif kind == 3:
        note["plan"] = "[" * 10**4
    else:
        plan[chance.choice(list(plan))] = chance.choice((None, 7, [], [[]], ["stem"], {"a": 1}))
        note["plan"] = json.dumps(plan)
    header["__metadata__"]["ss_pruning"] = json.dumps(note)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


MUTATIONS = (flipped, flipped, truncated, extended, spliced, sized, renoted, renoted)


def mutants(content: bytes, number: int) -> Iterator[tuple[str, bytes]]:
    for seed in range(number):
        chance = random.Random(seed)
        mutation = MUTATIONS[seed % len(MUTATIONS)]
        yield f"{mutation.__name__}, seed {seed}", mutation(content, chance)


@pytest.mark.parametrize("number", [160, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_the_same(
    original: tuple[bytes, nn.Module], tmp_path: Path, number: int
) -> None:
    content, model = original
    path, refused = tmp_path / "mutant.safetensors", 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, mutant in mutants(content, number):
        path.write_bytes(mutant)
        begin = time.perf_counter()
        try:
            loaded = load(path, Small)
        except SSPruningError:
            refused += 1
        else:
            assert same(loaded, model), what
            assert torch.equal(loaded(X), model(X)), what
        assert time.perf_counter() - begin < 5, what
    assert refused > 0.9 * number
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 100 * 1024, f"{grown / 1024:.0f} MiB"  # in KiB on Linux


def test_the_fuzz_can_fail(original: tuple[bytes, nn.Module], tmp_path: Path) -> None:
    """A flipped weight in a file without a checksum is another model, and `same` sees it."""
    path = changed(original[0], tmp_path, lambda note: note.update(format=1, sha256=None))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not same(load(path, Small), original[1])


def _plan(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def change(note: dict[str, Any]) -> None:
        plan = json.loads(note["plan"])
        plan["cuts"][0].update({k: v for k, v in changes.items() if k in plan["cuts"][0]})
        plan.update({k: v for k, v in changes.items() if k in plan})
        note["plan"] = json.dumps(plan)

    return change


NUMBER = {"path": "body", "name": "padding", "position": 0, "before": 1, "after": 10**9}


@pytest.mark.parametrize(
    "change",
    [
        _plan(width=10**12),
        _plan(kept=[0] * 9),
        _plan(side="tensor"),
        _plan(side="tensor", path="stem.weight", axis=10**9),
        _plan(path="no.such.layer"),
        _plan(path=""),
        _plan(biases=["norm"]),
        _plan(biases=["stem"]),
        _plan(biases=[[]]),
        _plan(attributes=[NUMBER | {"path": "__class__"}]),
        _plan(attributes=[NUMBER | {"name": "forward"}]),
        _plan(attributes=[NUMBER | {"position": 10**9}]),
        _plan(attributes=[NUMBER | {"position": -1}]),
        _plan(attributes=[NUMBER]),  # padding that no memory holds
        lambda note: note.update(plan="[" * 10**5),
        lambda note: note.update(plan="1" * 10**5),
        lambda note: note.update(architecture=7, plan=7),
    ],
)
def test_hostile_plans_are_refused_though_their_checksum_fits(
    original: tuple[bytes, nn.Module], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = changed(original[0], tmp_path, change, seal=True)
    with pytest.raises((PlanError, FileFormatError)):
        load(path, Small)


@pytest.mark.parametrize("spec", ["net.py:build", "os:system", "/bin/sh:x", "timm"])
def test_files_never_name_code_to_run(original: tuple[bytes, nn.Module], tmp_path: Path, spec: str) -> None:
    path = changed(original[0], tmp_path, lambda note: note.update(architecture=spec), seal=True)
    with pytest.raises((InputError, FileFormatError)):
        load(path)


def test_a_fit_check_is_made_before_the_tensors_are_used(
    original: tuple[bytes, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(original[0])
    with pytest.raises(
        PlanError, match="the plan expects 8 channels on side 'out' of 'stem', the model has no such"
    ):
        load(path, BY_NAME["plain"].make)


# ---------------------------------------------------------------- Torch-Pruning's histories


def pruned_by_torch_pruning(
    make: Callable[[], nn.Module], x: Tensor, steps: int = 1
) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = make().eval()
    pruner = tp.pruner.BasePruner(
        model,
        x,
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=steps,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
        pruning_ratio_dict={},
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        customized_pruners={},
    )
    for _ in range(steps):
        pruner.step()
    return model, pruner.pruning_history()


ZOO = ["plain", "residual_chain", "dense", "separable", "grouped", "transposed", "flattened"]


@pytest.mark.parametrize("name", ZOO)
def test_checkpoints_of_torch_pruning_load(name: str, tmp_path: Path) -> None:
    net = BY_NAME[name]
    model, history = pruned_by_torch_pruning(net.make, net.example, steps=2)
    torch.save({"model": model.state_dict(), "pruning": history}, tmp_path / "pruned.pth")
    loaded = load(tmp_path / "pruned.pth", net.make, net.example)
    assert history
    assert torch.equal(loaded(net.example), model(net.example))
    save(loaded, tmp_path / "pruned.safetensors")  # from now on ours
    assert same(load(tmp_path / "pruned.safetensors", net.make), loaded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "densenet121", "mobilenet_v3_large", "regnet_x_400mf"])
def test_checkpoints_of_torch_pruning_load_by_name(name: str, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 64, 64)
    model, history = pruned_by_torch_pruning(
        lambda: torchvision.models.get_model(name, weights=None), x, steps=3
    )
    torch.save({"model": model.state_dict(), "pruning": history}, tmp_path / "pruned.pth")
    loaded = load(tmp_path / "pruned.pth", f"torchvision:{name}")
    assert torch.equal(loaded(x), model(x))


def test_checkpoints_of_graph_pruner_load(tmp_path: Path) -> None:
    net = BY_NAME["shuffle"] if "shuffle" in BY_NAME else BY_NAME["dense"]
    model = net.make().eval()
    pruner = GraphPruner(model, net.example, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5)
    pruner.step()
    torch.save(
        {"state_dict": model.state_dict(), "pruning_history": pruner.pruning_history()}, tmp_path / "p.pth"
    )
    assert same(load(tmp_path / "p.pth", net.make), model)


def test_torch_prunings_whole_modules_are_not_unpickled(tmp_path: Path) -> None:
    torch.save(tp.state_dict(pruned()), tmp_path / "whole.pth")
    with pytest.raises(FileFormatError, match=r"could run code\. Write torch\.save\(\{'model'"):
        load(tmp_path / "whole.pth", Small)


@pytest.mark.parametrize("content", [{"model": {}}, {"pruning": []}, [], {"model": {}, "pruning": 3}])
def test_other_checkpoints_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(FileFormatError, match="holds no weights beside a pruning history"):
        load(tmp_path / "other.pth", Small)


@pytest.mark.parametrize(
    "history", [[["stem", True]], [["no", True, [0]]], [[7, 7, 7]], [["stem", True, "{}"]]]
)
def test_histories_that_do_not_fit_are_refused(history: Any) -> None:
    with pytest.raises(PlanError):
        plan_of(history, Small(), X)


def test_a_history_of_torch_pruning_needs_inputs(tmp_path: Path) -> None:
    model, history = pruned_by_torch_pruning(Small, X)
    torch.save({"model": model.state_dict(), "pruning": history}, tmp_path / "pruned.pth")
    with pytest.raises(InputError, match="pass example_inputs="):
        load(tmp_path / "pruned.pth", Small)


# ---------------------------------------------------------------- killed while writing


def _save_for_ever(path: str, ready: Any) -> None:
    torch.set_num_threads(1)
    models = [pruned(seed) for seed in (1, 2)]
    ready.set()
    while True:
        for model in models:
            save(model, path)


def _prune(arguments: list[str], ready: Any) -> None:
    from ss_pruning.cli.app import app

    torch.set_num_threads(1)
    ready.set()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    app(arguments)


def killed_after(seconds: float | None, target: Callable[..., None], *arguments: Any) -> None:
    """Run `target` in a process of its own and kill it so long after it is ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ss_pruning.cli.app", "ss_pruning.pruning", "tests.io.test_checkpoint"])
    ready = context.Event()
    process = context.Process(target=target, args=(*arguments, ready), daemon=True)
    process.start()
    assert ready.wait(60)
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()


FEW_OR_FIFTY = pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])


@FEW_OR_FIFTY
def test_a_killed_save_leaves_a_whole_file(tmp_path: Path, kills: int) -> None:
    path, chance = tmp_path / "model.safetensors", random.Random(0)
    save(pruned(0), path)
    choices = [pruned(seed) for seed in range(3)]
    for _ in range(kills):
        killed_after(chance.uniform(0, 0.05), _save_for_ever, str(path))
        loaded = load(path, Small)
        assert any(same(loaded, model) for model in choices)
    # What a kill leaves besides is hidden: ours, and files that safetensors writes before it renames them.
    assert all(entry == path or entry.name.startswith(".") for entry in tmp_path.iterdir())


@FEW_OR_FIFTY
def test_a_killed_prune_loses_nothing_that_was_saved(tmp_path: Path, kills: int) -> None:
    out, chance = tmp_path / "out", random.Random(1)
    begin = time.perf_counter()
    killed_after(None, _prune, ["prune", "demo:digits", "--macs", "0.6", "--out", str(out)])
    whole = time.perf_counter() - begin
    names = ("model.safetensors", "report.json", "report.html")
    models = [(out / names[0]).read_bytes()]
    assert all((out / name).is_file() for name in names)
    for kill in range(kills):
        macs = ("0.7", "0.6")[kill % 2]
        killed_after(
            chance.uniform(0, whole), _prune, ["prune", "demo:digits", "--macs", macs, "--out", str(out)]
        )
        content = (out / names[0]).read_bytes()
        if content not in models:
            assert len(models) == 1  # there are two models to be written, no third
            models.append(content)
        load(out / names[0])
        ss_pruning.report.records.Report.load_json(out / names[1])
        assert (out / names[2]).read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("path", ["nowhere", "", "x" * 5000, "/proc/self/mem"])
def test_a_file_that_cannot_be_read_is_named(path: str) -> None:
    for read in (load, architecture_of):
        with pytest.raises(InputError, match=r"there is no file|is a folder|cannot read"):
            read(path)
        with pytest.raises(InputError, match=r"a NoneType is no path to read"):
            read(None)  # type: ignore[arg-type]


def test_a_model_in_the_place_of_its_maker_is_named(
    original: tuple[bytes, nn.Module], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(original[0])
    for wrong in (nn.Linear(1, 1), 5, []):
        with pytest.raises(InputError, match="pass a callable that builds the dense model"):
            load(path, wrong)  # type: ignore[arg-type]


def test_an_architecture_that_is_no_name_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="architecture=5 is no name"):
        save(nn.Linear(1, 1), tmp_path / "a.safetensors", 5)  # type: ignore[arg-type]
    for name, said in {
        "resnet18": "torchvision:resnet18",
        "torchvision:resnet81": "resnet18",
        "": "unknown",
    }.items():
        with pytest.raises(InputError, match=said):
            save(nn.Linear(1, 1), tmp_path / "a.safetensors", name)
    assert not list(tmp_path.iterdir())


def test_plans_are_readable_on_their_own() -> None:
    plan = pruned().ss_pruning_plan
    assert Plan.from_json(plan.to_json()) == plan


def test_a_full_disk_and_a_pipe_are_named_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors' own writer would raise an error of its own, and put a file where the pipe was."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="it is a FIFO, not a regular file"):
        save(pruned(), tmp_path / "pipe")

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"the disk is full; free some space"):
        save(pruned(), tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["pipe"]


class Versioned(nn.Sequential):
    """Loads only what says of which version it is, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *others)


class PlainState(nn.Sequential):
    """Gives its state as a plain dict, which tells no versions."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return dict(super().state_dict(*args, **kwargs))


def test_a_state_without_versions_is_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return PlainState(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()

    model, x = build(), torch.randn(2, 3, 8, 8)
    ss_pruning.prune_(model, x, ratio=0.5)
    save(model, tmp_path / "small.safetensors")
    assert torch.equal(load(tmp_path / "small.safetensors", build)(x), model(x))


def test_modules_that_ask_for_their_version_are_told(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        return Versioned(*layers).eval()

    model, x = build(), torch.randn(2, 3, 8, 8)
    ss_pruning.prune_(model, x, ratio=0.5)
    save(model, tmp_path / "small.safetensors")
    assert torch.equal(load(tmp_path / "small.safetensors", build)(x), model(x))
