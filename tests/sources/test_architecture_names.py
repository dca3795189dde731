"""Architectures that files name: whatever a file says, nothing is fetched, opened or run."""

from __future__ import annotations

import functools
import http.server
import json
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from typer.testing import CliRunner

import ss_pruning
from ss_pruning.cli.app import app
from ss_pruning.errors import FileFormatError, InputError, SSPruningError
from ss_pruning.io.checkpoint import _Content, load, save
from ss_pruning.sources import architecture_names as named
from ss_pruning.sources.architecture_names import OPTIONS, build_named, without_weights
from ss_pruning.sources.models import build_model
from ss_pruning.surgery.plan import Plan

LIBRARIES = tuple({sys.prefix, sys.base_prefix, str(Path(torch.__file__).parents[1])})


class Watch:
    """What Python itself is asked to open, connect to or start while `on` (audit events cannot be bypassed)."""

    def __init__(self) -> None:
        self.on, self.seen, self.own = False, [], ""
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], str) and args[0] != self.own:
            if not args[0].startswith(LIBRARIES):
                self.seen.append((event, args[0]))
        elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.mkdir"):
            self.seen.append((event, args))

    def __enter__(self) -> Watch:
        self.on, self.seen = True, []
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False


WATCH = Watch()


class Server(http.server.SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012 - shared on purpose

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        self.requests.append(format % args)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and working folder of its own, with things to be stolen or run in it."""
    (tmp_path / "served").mkdir()
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "served" / "weights.pth")
    (tmp_path / "net.py").write_text("raise SystemExit('run')\ndef build(): ...\n")
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME", "SS_PRUNING_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def address(place: Path) -> Iterator[str]:
    handler = functools.partial(Server, directory=str(place / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    Server.requests.clear()
    yield f"http://127.0.0.1:{server.server_port}/weights.pth"
    server.shutdown()
    server.server_close()
    thread.join()


def named_file(path: Path, spec: str) -> Path:
    """A file with a checksum that fits: nothing is wrong with it but the name."""
    tensors = {"a": torch.zeros(1)}
    content = _Content(spec, Plan().to_json(), tensors)
    note = {"format": 2, "architecture": spec, "plan": content.plan, "sha256": content.checksum()}
    save_file(tensors, path, metadata={"ss_pruning": json.dumps(note)})
    return path


NAMES = [
    "timm:test_resnet",
    "timm:test_resnet.r160_in1k",
    "timm:hf-hub:timm/test_resnet.r160_in1k",
    "timm:hf_hub:timm/test_resnet.r160_in1k",
    "timm:local-dir:PLACE/served",
    "timm:PLACE/served",
    "timm:../served",
    "torchvision:squeezenet1_1",
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:models.resnet18",
    "demo:digits",
    "hf-hub:timm/resnet18",
    "local-dir:PLACE/served",
    "PLACE/net.py:build",
    "net.py:build",
    "ADDRESS",
    "file://PLACE/net.py:build",
]
GIVEN = [
    "",
    "pretrained=True",
    "pretrained=True,pretrained_cfg={'url':'ADDRESS'}",
    "pretrained=True,pretrained_cfg={'file':'PLACE/served/weights.pth'}",
    "pretrained=True,pretrained_cfg_overlay={'url':'ADDRESS'},cache_dir=PLACE/chosen",
    "pretrained=True,pretrained_cfg_overlay={'hf_hub_id':'a/b'}",
    "checkpoint_path=PLACE/served/weights.pth",
    "cache_dir=PLACE/chosen",
    "weights=DEFAULT",
    "weights=IMAGENET1K_V1,progress=False",
    "weights=ADDRESS",
    "weights=None,weights_backbone=DEFAULT",
    "weights_backbone=IMAGENET1K_V1",
    "features_only=True,out_indices=[1]",
    "features_only=True,feature_cls=getter",
    "num_classes=1000000000000",
    "num_classes=-1",
    "num_classes=1e3",
    "num_classes=10**12",
    "num_classes=nan",
    f"num_classes={'9' * 30}",
    "in_chans=4096",
    "img_size=1000000",
    "drop_rate=inf",
    "drop_rate=0.5j",
    "drop_rate=True",
    "global_pool=" + "[" * 2000,
    "global_pool=('a'*10**9)",
    "global_pool=../../etc/passwd",
    "act_layer=os.system",
    "scriptable=True,exportable=True,no_jit=True",
    "norm_layer=__import__('os').system('true')",
    "num_classes=१०",
    "num_classes=10\x00",
    "num_classes=10\n",
    "num_classes=10,num_classes=" + "1" * 500,
    "pretrained=True\u2028",
    "__class__=1",
    "kwargs=1,self=2,name=3,model_name=hf-hub:a/b",
]


def hostile(place: Path, address: str, mutants: int) -> Iterator[str]:
    specs = [
        f"{name},{given}".rstrip(",").replace("PLACE", str(place)).replace("ADDRESS", address)
        for name in NAMES
        for given in GIVEN
    ]
    yield from specs
    chance = random.Random(0)
    alphabet = "timorchvsn:=,._-/{}[]()'\"\\ \t\n\0TF01789eé\u200b\U0001f600"
    for _ in range(mutants):
        spec = list(chance.choice(specs))
        for _ in range(chance.randrange(1, 6)):
            position = chance.randrange(len(spec) + 1)
            spec[position : position + chance.randrange(3)] = chance.choices(alphabet, k=chance.randrange(3))
        yield "".join(spec)


@pytest.mark.parametrize("mutants", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_name_in_a_file_fetches_opens_or_runs_anything(place: Path, address: str, mutants: int) -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    path = place / "model.safetensors"
    for spec in ("timm:test_resnet", "torchvision:squeezenet1_1", "demo:digits"):
        load_or_not(named_file(path, spec))  # imports what is imported only once
    before = sorted(place.rglob("*"))
    WATCH.own, kinds = str(path), set()
    for spec in hostile(place, address, mutants):
        named_file(path, spec)
        with WATCH:
            kinds.add(load_or_not(path))
        assert WATCH.seen == [], spec
    assert Server.requests == []
    assert sorted(place.rglob("*")) == before
    # Most are refused by their name, some for there being no such model, and what was built for its tensors.
    assert {"FileFormatError", "InputError", "PlanError"} == kinds


def load_or_not(path: Path) -> str:
    with pytest.raises(SSPruningError) as caught:
        load(path)
    return type(caught.value).__name__


def test_the_watch_and_the_server_see_what_a_user_may_ask_for(place: Path, address: str) -> None:
    """The same words on the command line are followed: the fuzz above would see it."""
    pytest.importorskip("timm", reason="timm is an extra")
    spec = (
        f"timm:test_resnet,pretrained=True,pretrained_cfg={{'url':'{address}'}},cache_dir={place / 'chosen'}"
    )
    with WATCH, pytest.raises(InputError):
        build_model(spec)
    assert len(Server.requests) == 1
    assert {"socket.connect", "open"} <= {event for event, _ in WATCH.seen}
    assert [entry.name for entry in (place / "chosen").rglob("*") if entry.is_file()] == ["weights.pth"]


@pytest.mark.parametrize("command", ["bench", "export"])
def test_commands_take_of_a_file_no_more_than_load_does(place: Path, address: str, command: str) -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    torch.manual_seed(0)
    model = build_model("timm:test_resnet")
    spec = f"timm:test_resnet,pretrained=True,pretrained_cfg={{'url':'{address}'}}"
    save(model, place / "model.safetensors", architecture=spec)
    before = sorted(place.rglob("*"))
    options = ["--format", "pt2"] if command == "export" else []
    result = CliRunner().invoke(app, [command, "model.safetensors", *options])
    assert result.exit_code == 2
    assert "is not passed on from a file" in " ".join(result.stderr.replace("│", " ").split()) or (
        "plain options" in " ".join(result.stderr.replace("│", " ").split())
    )
    assert Server.requests == []
    assert sorted(place.rglob("*")) == before


def test_what_the_user_names_is_the_users(place: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(weights=None, num_classes=5)
    save(model, "model.safetensors", architecture="torchvision:squeezenet1_1,num_classes=5,weird=1")
    with pytest.raises(
        FileFormatError, match=r"option 'weird' is not passed on .*load\(path, architecture\)"
    ):
        load("model.safetensors")
    x = torch.randn(1, 3, 64, 64)
    found = load("model.safetensors", "torchvision:squeezenet1_1,num_classes=5")
    assert torch.equal(found(x), model.eval()(x))
    with pytest.raises(InputError, match="would run code of a local file"):
        load("model.safetensors", "net.py:build")


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (
            "torchvision:squeezenet1_1, num_classes=7,dropout=0.25",
            lambda: torchvision.models.squeezenet1_1(num_classes=7, dropout=0.25),
        ),
        (
            "torchvision:lraspp_mobilenet_v3_large,num_classes=3",
            lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
                weights_backbone=None, num_classes=3
            ),
        ),
        (
            "torchvision:googlenet,weights=DEFAULT",  # what it was then is more than its weights
            lambda: torchvision.models.googlenet(transform_input=True, aux_logits=False, init_weights=True),
        ),
        ("timm:test_resnet,pretrained=True,num_classes=4,in_chans=1,drop_rate=0.1", None),
    ],
)
def test_plain_options_are_passed_on(place: Path, spec: str, make: Any) -> None:
    if make is None:
        timm = pytest.importorskip("timm", reason="timm is an extra")
        make = functools.partial(timm.create_model, "test_resnet", num_classes=4, in_chans=1, drop_rate=0.1)
    torch.manual_seed(0)
    model = make().eval()
    save(model, "model.safetensors", architecture=spec)
    with WATCH:
        found = load("model.safetensors")
    channels = 1 if "in_chans=1" in spec else 3
    x = torch.randn(2, channels, 64, 64)
    a, b = found(x), model(x)
    assert repr(found) == repr(model)
    assert torch.equal(a["out"], b["out"]) if isinstance(a, dict) else torch.equal(a, b)


def test_the_list_of_options_names_no_place_and_no_code() -> None:
    known = set().union(*OPTIONS.values())
    assert not known & {"pretrained", "weights", "weights_backbone", "checkpoint_path", "cache_dir"}
    for fits in (fits for options in OPTIONS.values() for fits in options.values()):
        for value in ("/etc/passwd" * 3, 10**12, -1, float("inf"), float("nan"), None, [1], {}, b"x", (1, 2)):
            assert not fits(value)


def test_a_small_file_cannot_ask_for_a_large_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named_file(place / "model.safetensors", "torchvision:squeezenet1_1")  # 5 MB
    made: list[int] = []
    real = nn.Conv2d.__init__
    monkeypatch.setattr(nn.Conv2d, "__init__", lambda self, *a, **k: (real(self, *a, **k), made.append(1))[0])
    monkeypatch.setattr(named, "_LEAST", 10**6)
    monkeypatch.setattr(named, "_TIMES", 1)
    with pytest.raises(FileFormatError, match="too large for a file of that size"):
        load("model.safetensors")
    whole = sum(isinstance(m, nn.Conv2d) for m in torchvision.models.squeezenet1_1().modules())
    assert 0 < len(made) - whole < whole  # it was stopped on the way
    monkeypatch.setattr(named, "_LEAST", 10**7)
    assert isinstance(build_named("torchvision:squeezenet1_1", place / "model.safetensors"), nn.Module)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_of_another_kind_are_refused(place: Path, dtype: torch.dtype) -> None:
    model = ss_pruning.sources.models.build_model("demo:digits")
    tensors = {key: value.to(dtype) for key, value in model.state_dict().items()}
    content = _Content("demo:digits", Plan().to_json(), tensors)
    note = {"format": 2, "architecture": "demo:digits", "plan": content.plan, "sha256": content.checksum()}
    save_file(tensors, "model.safetensors", metadata={"ss_pruning": json.dumps(note)})
    with pytest.raises(ss_pruning.errors.PlanError, match=f"is {dtype} in .*, torch.float32 in the arch"):
        load("model.safetensors")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("timm:resnet18,num_classes=10,pretrained=True", "timm:resnet18,num_classes=10,pretrained=False"),
        ("torchvision:resnet18,weights=DEFAULT", "torchvision:resnet18,weights=None,weights_backbone=None"),
        ("demo:digits", "demo:digits"),
    ],
)
def test_a_name_without_weights_asks_for_none(spec: str, name: str, tmp_path: Path) -> None:
    assert without_weights(spec, tmp_path / "file") == name
