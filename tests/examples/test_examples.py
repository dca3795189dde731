"""What the README and the examples show runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.scripts import loaded

ROOT = Path(__file__).parents[2]
#: Lightning uses what PyTorch has deprecated.
LIGHTNINGS_OWN = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"
#: The pages' models have random weights, so that their outputs may hardly differ from image to image.
OF_UNTRAINED = "ignore:the INT8 file's output error is"


def run(folder: Path, *arguments: str) -> str:
    """Run Python in `folder`, so that what it writes lands there; warnings are errors there too."""
    command = [sys.executable, "-W", "error", "-W", LIGHTNINGS_OWN, "-W", OF_UNTRAINED, *arguments]
    # The checkout's own package, installed or not.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(folder: Path, name: str, *arguments: str) -> str:
    """Run a script of `examples/`; skip where an optional package that it needs is missing."""
    script = ROOT / "examples" / name
    need(script.read_text("utf-8"))
    return run(folder, str(script), *arguments)


def readme_blocks() -> list[str]:
    """Return the Python code blocks of the README; pretrained weights would need a download."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return [block.replace("pretrained=True", "pretrained=False") for block in blocks]


def pages() -> list[Path]:
    """Return the pages of the documentation that hold Python."""
    return [
        page for page in sorted((ROOT / "docs").rglob("*.md")) if "```python\n" in page.read_text("utf-8")
    ]


def need(code: str) -> None:
    """Skip unless the optional packages that the code imports are here."""
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, flags=re.MULTILINE))
    wanted = imported | ({"nni"} if "nni_adapter" in code else set())
    wanted |= {"sklearn"} if "digits_data" in code else set()
    wanted |= {"ultralytics"} if "integrations.ultralytics" in code else set()
    optional = {
        "accelerate",
        "nni",
        "onnx",
        "onnxruntime",
        "pytorch_lightning",
        "ray",
        "segmentation_models_pytorch",
        "sklearn",
        "timm",
        "ultralytics",
    }
    for name in wanted & optional:
        pytest.importorskip(name, reason=f"the code needs the optional package {name}")


def test_readme_shows_its_uses_in_python() -> None:
    blocks = readme_blocks()
    for use in (
        "SynapticImportance()",
        "GraphPruner(",
        "macs=",
        'compensation="reconstruct"',
        "ss_pruning.load(",
    ):
        assert any(use in block for block in blocks), use


@pytest.mark.slow
@pytest.mark.parametrize("block", readme_blocks(), ids=lambda block: block.strip().splitlines()[-1][:40])
def test_readme_code_runs(block: str, tmp_path: Path) -> None:
    need(block)
    run(tmp_path, "-c", block)


def test_the_documentation_has_code() -> None:
    names = {page.name for page in pages()}
    assert {"tutorial.md", "theory.md", "own_importance.md", "training_loop.md", "nni.md"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_code_of_the_documentation_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page, in order and in one process: a later one may use what an earlier one made."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL))
    need(code)
    # NNI itself calls what PyTorch has deprecated, and warns of it.
    lenient = ["-W", "default"] if "from nni." in code else []
    run(tmp_path, *lenient, "-c", code)


def commands(page: Path) -> list[str]:
    """Return the `ss-prune` commands that a page shows."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("ss-prune ")]


def lay_out(folder: Path) -> None:
    """Put what the commands name into a folder: weights, a model file, photos."""
    import torchvision
    from PIL import Image

    networks = {"resnet50.safetensors": "resnet50", "r18.safetensors": "resnet18"}
    for file, name in networks.items():
        save_file(torchvision.models.get_model(name, weights=None).state_dict(), folder / file)
    (folder / "models").mkdir()
    source = "import torchvision\n\ndef build():\n    return torchvision.models.resnet18(weights=None)\n"
    (folder / "models" / "net.py").write_text(source)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), folder / "net.pth")
    for number, label in enumerate(("cat", "dog")):
        (folder / "photos" / label).mkdir(parents=True)
        for index in range(4):
            picture = Image.new("RGB", (72, 72), (60 * index, 90 * number, 30))
            picture.save(folder / "photos" / label / f"{index}.png")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.stem
)
def test_commands_of_the_documentation_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order and in one folder, on small images where a command does not say how large they are."""
    shown = commands(page)
    if not shown:
        pytest.skip("the page shows no command")
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    lay_out(tmp_path)
    for command in shown:
        words = shlex.split(command, comments=True)[1:]
        need(
            "".join(
                f"import {name}\n"
                for name in ("timm", "onnx")
                if re.search(f"{name}:|--format {name}", command)
            )
        )
        need("digits_data" if "--data digits" in command else "")
        if words[0] in ("prune", "score") and "demo:" not in command and "--input-size" not in words:
            words += ["--input-size", "3x32x32"]
        run(tmp_path, "-m", "ss_pruning.cli", *words)


@pytest.mark.slow
def test_quickstart_runs(tmp_path: Path) -> None:
    output = example(tmp_path, "torch_pruning/quickstart.py")
    kept = [int(share) for share in re.findall(r"(\d+)%", output)]
    assert len(kept) == 2
    assert all(30 < share < 80 for share in kept)


@pytest.mark.slow
def test_custom_importance_keeps_what_magnitude_loses(tmp_path: Path) -> None:
    output = example(tmp_path, "torch_pruning/custom_importance.py", "--macs", "0.5")
    reached = dict(re.findall(r"│ (entropy lost|SynapticImportance|group magnitude)[^│]*│ ([\d.]+)%", output))
    assert float(reached["entropy lost"]) > float(reached["group magnitude"])
    assert float(reached["entropy lost"]) > 90


def test_the_picture_is_what_its_script_draws() -> None:
    figure = loaded(ROOT / "scripts" / "synapse_figure.py")
    assert figure.PICTURE.read_text(encoding="utf-8") == figure.picture()


def test_timm_example_prunes_saves_and_loads(tmp_path: Path) -> None:
    output = example(tmp_path, "timm/prune.py", "test_resnet", "--macs", "0.7", "--out", "pruned.safetensors")
    assert "loaded again: largest difference 0.0" in output
    assert (tmp_path / "pruned.safetensors").stat().st_size > 0


def test_nni_example_ends_with_the_masked_accuracy(tmp_path: Path) -> None:
    output = example(tmp_path, "nni/config.py", "--epochs", "2", "--out", "small.safetensors")
    shares = dict(re.findall(r"(dense|masked|fine-tuned|compacted) +│ +([\d.]+) %", output))
    assert set(shares) == {"dense", "masked", "fine-tuned", "compacted"}
    assert shares["compacted"] == shares["fine-tuned"]
    assert f"loaded again: top-1 {shares['compacted']} %" in output
    parameters = re.search(r"parameters .*?([\d.]+) % │", output)
    assert parameters
    assert float(parameters.group(1)) < 60


@pytest.mark.slow
def test_nni_example_on_a_timm_model(tmp_path: Path) -> None:
    output = example(tmp_path, "nni/timm_model.py", "test_efficientnet")
    differences = [float(text) for text in re.findall(r"in single precision: (\S+)", output)]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_synapses_that_go_leave_a_smaller_model_of_the_same_accuracy(tmp_path: Path) -> None:
    output = example(tmp_path, "sparse_training/synapses.py", "--epochs", "3")
    reached = dict(re.findall(r"(masked|fine-tuned|compacted): ([\d.]+) %", output))
    assert float(reached["fine-tuned"]) > max(70, float(reached["masked"]))
    assert reached["compacted"] == reached["fine-tuned"]
    parameters = re.search(r"with (\d+)% of the parameters", output)
    assert parameters
    assert int(parameters.group(1)) < 85


def test_training_example_writes_weights_that_fit(tmp_path: Path) -> None:
    output = example(tmp_path, "sparse_training/digits.py", "--epochs", "1")
    assert "accuracy, test:" in output
    check = (
        "from ss_pruning.sources.demo import digits_resnet; from safetensors.torch import load_file;"
        "digits_resnet().load_state_dict(load_file('digits_resnet.safetensors'))"
    )
    run(tmp_path, "-c", check)


def test_the_readme_can_be_read() -> None:
    """At most 130 lines and 1,100 words of prose: everything else belongs to docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    prose = re.sub(r"```.*?```|^\|[^\n]*|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "Five limits" in prose
    assert len(prose.split()) <= 1100
