"""What the README and the examples show runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(folder: Path, *arguments: str) -> str:
    """Run Python in `folder`, so that what it writes lands there; warnings are errors there too."""
    command = [sys.executable, "-W", "error", *arguments]
    # The checkout's own package, installed or not.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme_blocks() -> list[str]:
    """Return the Python code blocks of the README; pretrained weights would need a download."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return [block.replace("pretrained=True", "pretrained=False") for block in blocks]


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
    if "nni_adapter" in block:
        pytest.importorskip("nni", reason="NNI is an optional extra: pip install 'ss-pruning[nni]'")
    run(tmp_path, "-c", block)


@pytest.mark.slow
def test_quickstart_runs(tmp_path: Path) -> None:
    output = run(tmp_path, str(ROOT / "examples" / "torch_pruning_quickstart.py"))
    kept = [int(share) for share in re.findall(r"(\d+)%", output)]
    assert len(kept) == 2
    assert all(30 < share < 80 for share in kept)


def test_timm_example_prunes_saves_and_loads(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "timm_prune.py")
    output = run(tmp_path, script, "test_resnet", "--macs", "0.7", "--out", "pruned.safetensors")
    assert "loaded again: largest difference 0.0" in output
    assert (tmp_path / "pruned.safetensors").stat().st_size > 0


def test_nni_example_ends_with_the_masked_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("nni", reason="NNI is an optional extra: pip install 'ss-pruning[nni]'")
    output = run(
        tmp_path, str(ROOT / "examples" / "nni_config.py"), "--epochs", "2", "--out", "small.safetensors"
    )
    shares = dict(re.findall(r"(dense|masked|fine-tuned|compacted) +│ +([\d.]+) %", output))
    assert set(shares) == {"dense", "masked", "fine-tuned", "compacted"}
    assert shares["compacted"] == shares["fine-tuned"]
    assert f"loaded again: top-1 {shares['compacted']} %" in output
    parameters = re.search(r"parameters .*?([\d.]+) % │", output)
    assert parameters
    assert float(parameters.group(1)) < 60


@pytest.mark.slow
def test_nni_example_on_a_timm_model(tmp_path: Path) -> None:
    pytest.importorskip("nni", reason="NNI is an optional extra: pip install 'ss-pruning[nni]'")
    output = run(tmp_path, str(ROOT / "examples" / "nni_timm.py"), "test_efficientnet")
    differences = [float(text) for text in re.findall(r"in single precision: (\S+)", output)]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_training_example_writes_weights_that_fit(tmp_path: Path) -> None:
    output = run(tmp_path, str(ROOT / "examples" / "train_digits.py"), "--epochs", "1")
    assert "accuracy, test:" in output
    check = (
        "from ss_pruning.demo import digits_resnet; from safetensors.torch import load_file;"
        "digits_resnet().load_state_dict(load_file('digits_resnet.safetensors'))"
    )
    run(tmp_path, "-c", check)
