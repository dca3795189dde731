"""Which models the coverage run looks at: one small variant per convolutional family, found by rules.

A *family* is a module of timm plus what a name says before its first digit, without size words (`convnext_atto_ols`
and `convnext_femto_ols` are both `convnext_ols`). It is convolutional or a hybrid if at least a third of the layers
with weights are convolutions and at least four have kernels that overlap (larger than their stride); patch embeddings
do not, so pure transformers and mixers fall out. Of a family the variant with the fewest parameters is taken, unless
even that has more than 140 million. All variants are built on the meta device to see: minutes, once per version of
timm; the result is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.common import RESULTS

#: Architectures known to be hard, each with a trait of its own.
NAMED = """resnetblur18 ecaresnet26t skresnet18 resnest50d_4s2x40d res2net50_26w_4s gcresnext26ts regnetz_b16_evos
cspresnet50 cs3darknet_s dpn68 dla60_res2net eca_vovnet39b mixnet_s efficientnet_blur_b0 mobilenetv4_hybrid_medium
lambda_resnet26t rexnet_100 fasternet_t0 fastvit_t8 nfnet_l0 poolformer_s12 botnet26t_256 efficientnet_cc_b0_4e"""

SIZE_WORD = re.compile(
    "zepto|atto|femto|pico|nano|micro|mini|tiny|small|sm|medium|base|x*large|huge|giant|plus|wide|so|"
    "x*s|m|x?l|xx?|ti?|e?[abcdefhkr]|e[lms]"
)
LEAST_SHARE, LEAST_OVERLAPPING, MOST_PARAMS = 1 / 3, 4, 140e6


@dataclass(frozen=True)
class Candidate:
    """A model as built on the meta device."""

    spec: str
    family: str
    params: int
    convolutions: float
    overlapping: int

    @property
    def convolutional(self) -> bool:
        return self.convolutions >= LEAST_SHARE and self.overlapping >= LEAST_OVERLAPPING


def family_of(name: str) -> str:
    """The name without size: what comes before its first digit, less size words."""
    first, *rest = [word for word in re.split(r"\d", name)[0].split("_") if word]
    return "_".join([first, *(word for word in rest if not SIZE_WORD.fullmatch(word))])


def candidate(spec: str, family: str, make: Callable[[], nn.Module]) -> Candidate:
    try:
        with torch.device("meta"):
            model = make()
    except NotImplementedError:  # computes its widths with tensors
        model = make()
    convolutions = [m for m in model.modules() if isinstance(m, _ConvNd)]
    linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    overlapping = sum(any(k > s for k, s in zip(c.kernel_size, c.stride, strict=True)) for c in convolutions)
    share = len(convolutions) / max(1, len(convolutions) + linear)
    return Candidate(spec, family, sum(p.numel() for p in model.parameters()), share, overlapping)


def _timm() -> Iterable[Candidate]:
    import timm
    from timm.models import _registry

    for name in timm.list_models(exclude_filters="test_*"):
        family = f"{_registry._model_to_module[name]}/{family_of(name)}"
        yield candidate(f"timm:{name}", family, partial(timm.create_model, name))


def _torchvision() -> Iterable[Candidate]:
    from torchvision import models

    for name in models.list_models(module=models):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        make = partial(models.get_model, name, weights=None, **options)
        module = models.get_model_builder(name).__module__.rpartition(".")[2]
        yield candidate(f"torchvision:{name}", f"{module}/{family_of(name)}", make)


def smallest(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The convolutional candidate with the fewest parameters of each family that has one."""
    best: dict[str, Candidate] = {}
    for c in candidates:
        key = f"{c.spec.partition(':')[0]}/{c.family}"
        if not c.convolutional or c.params > MOST_PARAMS:
            continue
        if key not in best or (c.params, c.spec) < (best[key].params, best[key].spec):
            best[key] = c
    return [best[key] for key in sorted(best)]


def default_names() -> list[Candidate]:
    """The list for the installed versions, from the kept file or found anew; the named ones are added to it."""
    path = RESULTS / "coverage_names.json"
    found_with = {name: version(name) for name in ("timm", "torchvision")}
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("versions") != found_with:
        kept = {"versions": found_with, "models": [asdict(c) for c in smallest([*_timm(), *_torchvision()])]}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    models = [Candidate(**c) for c in kept["models"]]
    known = {c.spec for c in models}
    named = [f"timm:{name}" for name in NAMED.split()]
    return models + [Candidate(spec, "known to be hard", 0, 1.0, 9) for spec in named if spec not in known]
