"""Every public function, in half precision on the GPU, says what it says in float32 on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import core
from core.activations.attention import record_attention
from core.activations.hooks import edit, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Generation
from tests.gpu.conftest import PROMPT

pytestmark = pytest.mark.gpu

Floats = NDArray[np.float64]
FEW: dict[str, Any] = {"seed": 0, "sampler": core.Sampler(n_points=4, exact_every=1)}
N_STEPS = 5


def latents(model: Diffuser, *contexts: Any, **settings: Any) -> Tensor:
    generation = model.generate(
        PROMPT, seed=0, num_inference_steps=N_STEPS, previews=False, contexts=contexts, **settings
    )
    return generation.latents


def updates(model: Diffuser, recorder: Any) -> Tensor:
    with recorder(model, [model.hookpoints[1]], steps=[N_STEPS - 1]) as recording:
        latents(model)
    return torch.cat([recording[key] for key in recording]).float()


def one_call(model: Diffuser) -> Tensor:
    x = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.predict_noise(x, torch.tensor([-4.0, 0.0, 4.0]), model.encode_text([PROMPT, "", "a dog"]))


def halved(model: Diffuser) -> Tensor:
    return latents(model, edit(model, lambda _, update: 0.5 * update))


def code(model: Diffuser, picture: Generation) -> Tensor:
    """What an SAE on the model's device leaves of activations that are the same everywhere."""
    sae = core.load_sae("picturebook", hookpoint=model.hookpoints[1], branch="cond", t="all", device=model.device)
    x = torch.randn(256, sae.cfg.d_in, generator=torch.Generator().manual_seed(int(picture.seed)))
    return sae.decode(sae.encode(x.to(model.device)))


def attributed(model: Diffuser, picture: Generation) -> Floats:
    a = core.attribute(model, picture.latents, PROMPT, rel_error=1e-9, max_evals=192, **FEW)
    return np.asarray(a.maps)


def decomposed(model: Diffuser, picture: Generation) -> Floats:
    d = core.decompose(model, picture.latents, PROMPT, "cat", "grass", rel_error=1e-9, max_evals=192, **FEW)
    return np.stack([d.redundancy.map, *(part.map for part in d.unique), d.synergy.map])


def ranked(model: Diffuser, picture: Generation) -> Floats:
    captions = [PROMPT, "a dog on the grass", "a cat on the snow"]
    r = core.rank_captions(model, picture.latents, captions, certainty=1 - 1e-12, max_evals=192, **FEW)
    assert r.order[0] == 0
    return np.asarray(r.bits)


def expected(model: Diffuser, picture: Generation) -> Floats:
    found = core.likelihood(model, picture.latents, PROMPT, error=1e-9, max_evals=192, seed=0)
    return np.array([found.bits_per_dim, found.unprompted_bits_per_dim])


def changed(model: Diffuser, picture: Generation) -> Floats:
    made = core.change_word(model, picture.latents, PROMPT, "cat", num_inference_steps=5)
    assert made.reconstruction_error < 0.1
    return np.sqrt(made.change)


FUNCTIONS: dict[str, tuple[Callable[[Diffuser, Generation], Any], float]] = {
    "predict_noise": (lambda model, _: one_call(model), 0.02),
    "generate": (lambda model, _: latents(model), 0.1),
    "encode": (lambda model, picture: model.encode(picture.image), 0.02),
    "decode": (lambda model, picture: np.asarray(model.decode(picture.latents)[0], np.float64), 0.02),
    "record": (lambda model, _: updates(model, record), 0.1),
    "record_attention": (lambda model, _: updates(model, record_attention), 0.1),
    "edit": (lambda model, _: halved(model), 0.25),
    "sae": (code, 1e-3),
    "attribute": (attributed, 0.05),
    "decompose": (decomposed, 0.05),
    "rank_captions": (ranked, 0.05),
    "likelihood": (expected, 0.05),
    "change_word": (changed, 0.15),
}
"""What each says, and how far that may be off, as a share of its length."""
_said: dict[str, Floats] = {}


def distance(found: Any, wanted: Floats) -> float:
    return float(np.linalg.norm(numbers(found) - wanted) / np.linalg.norm(wanted))


def numbers(found: Any) -> Floats:
    return found.double().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found, np.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_says_the_same(name: str, narrow: Diffuser, reference: Diffuser, drawn: Generation) -> None:
    function, most = FUNCTIONS[name]
    if name not in _said:
        _said[name] = numbers(function(reference, drawn))
    found = distance(function(narrow, drawn), _said[name])
    print(f"{name}, {narrow.dtype}: {found:.2g} of {most}")
    assert found < most
    assert np.linalg.norm(_said[name]) > 0
    assert narrow.unet.dtype == narrow.dtype != torch.float32


def test_two_precisions_say_the_same_within_their_error(
    narrow: Diffuser, reference: Diffuser, drawn: Generation
) -> None:
    options: dict[str, Any] = {"seed": 0, "rel_error": 1e-9, "max_evals": 768}
    a = core.attribute(narrow, drawn.latents, PROMPT, sampler=core.Sampler(exact_every=4), **options)
    b = core.attribute(reference, drawn.latents, PROMPT, **options)
    assert " and float32" in a.settings["dtype"]
    assert (np.abs(a.bits - b.bits) <= 1.5 * a.interval_factor() * np.hypot(a.stderr, b.stderr)).all()


def test_a_layout_and_an_edit_by_its_label_are_the_same(narrow: Diffuser, reference: Diffuser) -> None:
    pytest.importorskip("pandas", reason="tables of concepts are pandas frames")
    pytest.importorskip("pyarrow", reason="tables of concepts are Parquet files")
    labels = [core.predict_layout(model, PROMPT, seed=0, step=0).labels for model in (narrow, reference)]
    assert (labels[0] == labels[1]).mean() > 0.9
    assert len(np.unique(labels[1])) > 1
    move = core.SpatialEdit(label="cat", region="top-left")
    moved = [latents(model, edits=[move]) for model in (narrow, reference)]
    assert distance(moved[0], numbers(moved[1])) < 0.15
    assert distance(moved[1], numbers(latents(reference))) > 0.3


def test_an_edit_of_strength_0_leaves_every_bit(narrow: Diffuser) -> None:
    plain = [latents(narrow) for _ in range(2)]
    assert torch.equal(*plain)
    assert torch.equal(plain[0], latents(narrow, edit(narrow, lambda _, update: update.clone())))
    pytest.importorskip("pandas", reason="tables of concepts are pandas frames")
    pytest.importorskip("pyarrow", reason="tables of concepts are Parquet files")
    assert torch.equal(plain[0], latents(narrow, edits=[core.SpatialEdit(label="cat", region="left", strength=0.0)]))


def test_a_seed_is_the_same_noise_everywhere(narrow: Diffuser, reference: Diffuser) -> None:
    """To the bit: what goes into the first call of the U-Net, before it is rounded to the model's precision."""
    for seed in (0, 7, 2**40):
        first, second = (model.sampler._initial_noise([seed]) for model in (narrow, reference))
        assert first.dtype == torch.float32
        assert torch.equal(first.cpu(), second)
    assert not torch.equal(narrow.sampler._initial_noise([0]), narrow.sampler._initial_noise([1]))
