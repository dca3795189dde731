"""Models by name, weights without pickles, and messages that contain the fix."""

from __future__ import annotations

import argparse
import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from ss_pruning.errors import InputError
from ss_pruning.sources.demo import digits_weights
from ss_pruning.sources.models import brings_weights, build_model, input_of
from ss_pruning.sources.preprocessing import IMAGENET_MEAN, Preprocess
from ss_pruning.sources.weights import load_weights, read_weights

FACTORY = """
import helper
from torch import nn

SIZE = 3

def build(width=4, bias=True):
    return helper.seal(nn.Sequential(nn.Conv2d(3, width, SIZE, bias=bias), nn.BatchNorm2d(width)))

def breaks():
    raise RuntimeError("no such width")

def number():
    return 4
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "helper.py").write_text("def seal(model):\n    return model.train()\n")
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return str(path)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def same(one: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, tensors[key]) for key, value in one.state_dict().items())


# ---------------------------------------------------------------- building


def test_torchvision() -> None:
    model = build_model("torchvision:resnet18")
    assert type(model).__name__ == "ResNet"
    assert not model.training
    assert input_of("torchvision:resnet18", model) == Preprocess()


def test_torchvision_knows_its_own_input_without_a_download() -> None:
    found = input_of("torchvision:efficientnet_b3", nn.Identity())
    assert found.size == (3, 300, 300)
    assert found.interpolation == "bicubic"
    assert found.crop == pytest.approx(300 / 320)


def test_torchvision_models_without_a_crop_get_the_usual_input() -> None:
    assert input_of("torchvision:fasterrcnn_resnet50_fpn", nn.Identity()) == Preprocess()


def test_timm() -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    model = build_model("timm:test_resnet,num_classes=7")
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)
    asked = model.pretrained_cfg
    found = input_of("timm:test_resnet", model)
    assert (found.size, found.mean, found.std) == (asked["input_size"], asked["mean"], asked["std"])
    assert found.crop == asked["crop_pct"]


def test_timm_names_may_carry_a_tag() -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    assert isinstance(build_model("timm:test_resnet.r160_in1k"), nn.Module)


def test_demo_comes_with_its_weights() -> None:
    assert same(build_model("demo:digits"), load_file(digits_weights()))
    assert input_of("demo:digits", build_model("demo:digits")).size == (1, 8, 8)


def test_file_is_executed_with_its_neighbours_and_arguments(factory: str) -> None:
    before = list(sys.path)
    model = build_model(f"{factory}:build,width=6,bias=False")
    assert model[0].weight.shape == (6, 3, 3, 3)
    assert model[0].bias is None
    assert not model.training
    assert sys.path == before
    assert input_of(f"{factory}:build", model).mean == IMAGENET_MEAN


def test_arguments_are_literals_or_text(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\n"
        "def build(**options):\n    net = nn.Identity()\n    net.got = options\n    return net\n"
    )
    model = build_model(f"{path}:build,a=1,b=0.5,c=True,d=None,e=relu")
    assert model.got == {"a": 1, "b": 0.5, "c": True, "d": None, "e": "relu"}
    model = build_model(f"{path}:build,blocks=[2,2,2], size=(32, 16),last=a,b")
    assert model.got == {"blocks": [2, 2, 2], "size": (32, 16), "last": "a,b"}


def test_what_a_function_takes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\ndef build(depth, width=8):\n    return nn.Linear(depth, width)\n")
    assert build_model(f"{path}:build,depth=3").weight.shape == (8, 3)
    for given in ("", ",dept=3", ",depth=3,size=4"):
        with pytest.raises(InputError, match=r"build takes \(depth, width=8\): .*build,depth=1"):
            build_model(f"{path}:build{given}")
    for given in ("(3)", "(depth=3)", ",3", "(depth=3,width=2)"):
        with pytest.raises(
            InputError, match=r"has no function 'build.*Arguments are given as in .*,depth=20"
        ):
            build_model(f"{path}:build{given}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", r"unknown model 'resnet18': write timm:NAME, .*Did you mean torchvision:resnet18"),
        ("", r"unknown model '': write timm:NAME"),
        ("timm:", r"unknown model 'timm:'"),
        ("hub:net", r"unknown model 'hub:net'"),
        ("torchvision:resnet1", r"torchvision has no model 'resnet1'\. The closest names are resnet18"),
        ("torchvision:resnet18,depth=3", r"torchvision:resnet18 could not be built: TypeError: .*depth"),
        ("demo:letters", r"unknown demo 'letters': the only one is demo:digits"),
        ("absent/net.py:build", r"no file 'absent/net.py' .*There is no folder 'absent' either"),
        ("net.py", r"name the function that builds the model, as in net\.py:build"),
    ],
)
def test_unknown_specs_say_what_to_write(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(spec)


def test_unknown_timm_name_lists_the_closest() -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    with pytest.raises(InputError, match=r"timm has no model 'resnet5O'\. The closest names are resnet50"):
        build_model("timm:resnet5O")


def test_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_timm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(InputError, match=r"timm is not installed|pip install 'ss-pruning\[timm\]'"):
        build_model("timm:resnet18")


def test_factories_that_fail_are_quoted(factory: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no function 'buidl'\. The closest names are build"):
        build_model(f"{factory}:buidl")
    with pytest.raises(InputError, match=r"has no function 'SIZE'\. It has build, "):
        build_model(f"{factory}:SIZE")
    with pytest.raises(InputError, match=r"could not be built: RuntimeError: no such width"):
        build_model(f"{factory}:breaks")
    with pytest.raises(InputError, match=r"returned a int; it must return a torch\.nn\.Module"):
        build_model(f"{factory}:number")
    with pytest.raises(InputError, match=r"no file .*nett\.py.* Did you mean '.*net\.py'"):
        build_model(f"{tmp_path / 'nett.py'}:build")


@pytest.mark.parametrize("code", ["import absent_module_xyz", "def (", "raise SystemExit(3)"])
def test_files_that_cannot_be_imported_are_quoted(tmp_path: Path, code: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(code)
    before = list(sys.path)
    with pytest.raises(
        InputError, match=r"broken\.py' cannot be imported: (ModuleNotFound|Syntax|SystemExit)"
    ):
        build_model(f"{path}:build")
    assert sys.path == before
    assert "ss_pruning_user_broken" not in sys.modules


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best": torch.tensor(0.9)},
        lambda state: {"model": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {
            "state_dict": {key: value + 1 for key, value in state.items()},
            "state_dict_ema": state,
        },
        lambda state: {
            "model": {key: value + 1 for key, value in state.items()},
            "ema": {"module": state, "updates": 7},
        },
        lambda state: {
            "net": {f"module.{key}": value for key, value in state.items()},
            "acc": torch.tensor(93.0),
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        },
        lambda state: {"checkpoint": state, "scaler": {}},
        lambda state: {"state_dict": {f"model.backbone.{key}": value for key, value in state.items()}},
        lambda state: {**state, "loss_history": {"last": torch.zeros(2)}},
        lambda state: {**state, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, out="runs")},
        lambda state: {
            "model": state,
            "model_ema": {f"module.{key}": value for key, value in state.items()}
            | {"n_averaged": torch.tensor(3)},
        },
        lambda state: {
            "state_dict": {f"net.model.{key}": value for key, value in state.items()}
            | {"loss.weight": torch.ones(3)}
        },
    ],
    ids=[
        *(
            "plain",
            "state_dict",
            "model",
            "nested",
            "module",
            "compiled",
            "both",
            "both-too",
            "ema",
            "ema-module",
        ),
        *("net", "checkpoint", "lightning", "more", "profiled", "options", "averaged", "with its loss"),
    ],
)
def test_checkpoints_of_every_make(
    net: nn.Module, tmp_path: Path, suffix: str, wrap: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    wanted = {key: value + 1 for key, value in net.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(wanted), path)
    load_weights(net, path)
    assert same(net, wanted)


def test_several_models_in_a_file_are_named(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    torch.save({"generator": state, "critic": state, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="tensors by name in 'generator'; 'critic': save those of the model"):
        load_weights(net, tmp_path / "w.pth")


def test_several_models_under_one_module_are_named(net: nn.Module, tmp_path: Path) -> None:
    both = {
        f"{who}.{key}": value for who in ("student", "teacher") for key, value in net.state_dict().items()
    }
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"tensors behind 'student\.'; 'teacher\.': save those of one alone"):
        load_weights(net, tmp_path / "w.pth")
    part = {key: value for key, value in both.items() if key not in ("student.0.weight", "teacher.3.bias")}
    torch.save({"state_dict": part}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"not in the model: student\."):
        load_weights(net, tmp_path / "w.pth")


def test_names_are_told_as_they_are_in_the_file(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"part.whole.a": torch.zeros(1), "part.whole.b": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"not in the model: part\.whole\.a"):
        load_weights(net, tmp_path / "w.pth")


def test_safetensors_and_half_precision(net: nn.Module, tmp_path: Path) -> None:
    wanted = {
        key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()
    }
    save_file(wanted, tmp_path / "weights.safetensors")
    load_weights(net, tmp_path / "weights.safetensors")
    assert same(net, {key: value.float() for key, value in wanted.items()})
    assert all(value.dtype != torch.float16 for value in net.state_dict().values())


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: (100 * x).to(torch.int8), "int8"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x.to_sparse(), "sparse, float32"),
        (lambda x: x.to("meta"), "without data, float32"),
    ],
)
def test_numbers_of_another_kind_are_refused(
    net: nn.Module, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    name = next(key for key, value in before.items() if value.ndim > 1)
    torch.save({**before, name: change(before[name])}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=f"of a kind that cannot be loaded: {name} is {said}\n"):
        load_weights(net, tmp_path / "w.pth")
    assert same(net, before)


def test_a_model_that_really_has_a_part_named_module(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"module": nn.Linear(2, 2)})

    wanted = make().state_dict()
    torch.save(wanted, tmp_path / "weights.pth")
    net = make()
    load_weights(net, tmp_path / "weights.pth")
    assert same(net, wanted)


def test_counters_of_batches_may_be_missing(net: nn.Module, tmp_path: Path) -> None:
    wanted = {key: value + 1 for key, value in net.state_dict().items() if "num_batches" not in key}
    torch.save(wanted, tmp_path / "weights.pth")
    load_weights(net, tmp_path / "weights.pth")
    assert torch.equal(net.get_parameter("0.weight"), wanted["0.weight"])


def test_by_order_takes_other_names_with_the_same_shapes(net: nn.Module, tmp_path: Path) -> None:
    wanted = {key: value + 1 for key, value in net.state_dict().items() if "num_batches" not in key}
    torch.save({f"other_{index}": value for index, value in enumerate(wanted.values())}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"The shapes agree in order.*--weights-by-order"):
        load_weights(net, tmp_path / "w.pth")
    load_weights(net, tmp_path / "w.pth", by_order=True)
    assert torch.equal(net.get_parameter("0.weight"), wanted["0.weight"])
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="holds 1 tensors, the model 8: they cannot be matched by order"):
        load_weights(net, tmp_path / "w.pth", by_order=True)


def test_misfit_names_the_first_few_and_changes_nothing(net: nn.Module, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = {key: value + 1 for key, value in before.items()}
    found["0.weight"] = torch.zeros(4, 3, 5, 5)
    del found["1.bias"]
    found["extra"] = torch.zeros(1)
    torch.save(found, tmp_path / "weights.pth")
    with pytest.raises(InputError) as caught:
        load_weights(net, tmp_path / "weights.pth")
    message = str(caught.value)
    assert "missing: 1.bias" in message
    assert "not in the model: extra" in message
    assert "0.weight is [4, 3, 5, 5] in the file, [4, 3, 3, 3] in the model" in message
    assert same(net, before)


def test_another_number_of_classes_is_explained(net: nn.Module, tmp_path: Path) -> None:
    found = dict(net.state_dict())
    found["3.weight"], found["3.bias"] = torch.zeros(9, 16), torch.zeros(9)
    torch.save(found, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"3\.weight has 9 outputs in the file.*num_classes=9"):
        load_weights(net, tmp_path / "weights.pth")


def test_long_lists_are_cut_short(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"missing: conv1\.weight; bn1\.weight; bn1\.bias and \d+ more\n"):
        build_model("torchvision:resnet18", tmp_path / "weights.pth")


class Trap:
    """Prints when unpickled, unless the loader refuses to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("sprung",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Trap()}, tmp_path / "weights.pth")
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert capsys.readouterr().out == "sprung\n"  # the trap works
    with pytest.raises(InputError, match=r"would run code from the file, which is refused.*state_dict\(\)"):
        read_weights(tmp_path / "weights.pth")
    assert capsys.readouterr().out == ""


def test_whole_models_are_refused(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="holds more than tensors, or is damaged"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("left", [1, 10, 0.5])
def test_truncated_files_are_refused(net: nn.Module, tmp_path: Path, name: str, left: float) -> None:
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(net.state_dict(), path)
    else:
        save_file(net.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left if isinstance(left, int) else len(whole) * left)])
    with pytest.raises(InputError, match="damaged"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"junk", b"\x80\x02]q", b"0" * 40, b"cos\nsystem\n", b"(lp0\nI1\na."])
def test_files_that_are_no_pickle_are_refused(tmp_path: Path, content: bytes) -> None:
    """Reading them may raise anything, such as a `struct.error`."""
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read_weights(tmp_path / "weights.pth")


def test_files_of_another_kind_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights file at"):
        read_weights(tmp_path / "weights.pth")
    with pytest.raises(InputError, match="is a folder: name the weights file in it"):
        read_weights(tmp_path)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(InputError, match=r"is empty: was it copied or downloaded to its end\?"):
        read_weights(tmp_path / "weights.pth")
    torch.save([torch.zeros(1)], tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"holds a list, not tensors by name\. Save model\.state_dict"):
        read_weights(tmp_path / "weights.pth")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"no tensors by name in .*it holds 'epoch', 'lr'"):
        read_weights(tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"Did you mean '.*weights\.pth'"):
        read_weights(tmp_path / "weight.pth")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(InputError, match=r"has no suffix of a weights file; understood are \.safetensors"):
        read_weights(tmp_path / "weights.h5")


@pytest.mark.parametrize(
    ("spec", "brings"),
    [
        ("timm:resnet18", False),
        ("timm:resnet18,pretrained=False", False),
        ("timm:resnet18,pretrained=True", True),
        ("torchvision:resnet18,weights=DEFAULT", True),
        ("torchvision:resnet18,weights=None", False),
        ("yolo:yolo11n.yaml", False),
        ("yolo:best.pt", True),
        ("demo:digits", True),
        ("net.py:build", False),
    ],
)
def test_a_name_tells_whether_it_brings_weights(spec: str, brings: bool) -> None:
    assert brings_weights(spec) is brings


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_modules_that_ask_for_their_version_are_loaded(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    dense, fresh = (torchvision.models.mnasnet0_5(num_classes=3).eval() for _ in range(2))
    path = tmp_path / f"weights.{suffix}"
    write = torch.save if suffix == "pth" else save_file
    write(dict(dense.state_dict()), path)
    load_weights(fresh, path)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh(x), dense(x))
