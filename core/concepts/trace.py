"""Code traces: the SAE codes of every step, block and branch while an image is generated.

A trace adds almost nothing to the cost of generating the image: the updates are encoded as the sampler computes them,
and only the few active latents of each position are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from core.activations.hooks import ActivationKey, Recording, record
from core.concepts.table import Evolution, activation_map, evolution
from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import cross_attention_blocks
from core.diffusion.sampling import Branch
from core.errors import ArtifactError, NotFiniteError
from core.sae.autoencoder import Code, SaeId, SparseAutoencoder, output_hookpoints
from core.sae.collection import Collection, find_collection, load_sae


class SaeSite(NamedTuple):
    """The place that an SAE for all times reads."""

    hookpoint: str
    """Dotted module name of the block."""
    branch: Branch
    """Branch of classifier-free guidance."""

    def __str__(self) -> str:
        """`hookpoint (branch)`, for messages."""
        return f"{self.hookpoint} ({self.branch})"


@dataclass(frozen=True, eq=False)
class CodeTrace:
    """The codes of one image."""

    codes: Mapping[ActivationKey, Code]
    """Codes of the h x w positions, row by row, on the CPU."""
    grids: Mapping[str, tuple[int, int]]
    """(h, w) of each hookpoint."""
    n_steps: int
    """Number of sampler steps, all of which are recorded."""

    def sites(self) -> tuple[SaeSite, ...]:
        """The sites with codes, in the order of the forward pass."""
        return tuple(dict.fromkeys(SaeSite(key.hookpoint, key.branch) for key in self.codes))

    def code(self, site: SaeSite, step: int) -> Code:
        """The code at one site and step.

        Raises:
            KeyError: There is no code for that site and step.
        """
        return self.codes[ActivationKey(*site, step)]

    def map(self, site: SaeSite, step: int, number: int) -> Tensor:
        """[h, w] value of one latent at one step; 0 where it is not active."""
        return activation_map(self.code(site, step), number, *self.grids[site.hookpoint])

    def evolution(self, site: SaeSite, number: int) -> Evolution:
        """The activation of one latent over the steps."""
        of_site = {key.step: code for key, code in self.codes.items() if (key.hookpoint, key.branch) == site}
        return evolution({step: code for step, code in of_site.items() if step is not None}, number)


class CodeTracer:
    """Encodes the updates of one run of the sampler, with a batch of one.

    Pass `context` to `model.generate` or `model.sample`, and call `trace` after the run.
    """

    context: Recording
    """The recording, for the `contexts` of the run."""
    hookpoints: tuple[str, ...]
    """Hookpoints of the SAEs."""
    outputs: frozenset[str]
    """Those where the block's output is read, not its update."""

    def __init__(self, model: Diffuser, saes: Mapping[SaeSite, SparseAutoencoder]) -> None:
        """`saes` are those of `load_saes`, or some of them."""
        self._saes = saes
        self._codes: dict[ActivationKey, Code] = {}
        self._grids: dict[str, tuple[int, int]] = {}
        self.hookpoints = tuple(dict.fromkeys(site.hookpoint for site in saes))
        self.outputs = output_hookpoints(saes)
        self.context = record(model, self.hookpoints, sink=self.see, outputs=self.outputs)

    def see(self, key: ActivationKey, update: Tensor) -> None:
        """Encode an update [1, C, h, w], if there is an SAE for it."""
        sae = self._saes.get(SaeSite(key.hookpoint, key.branch))
        if sae is not None:
            code = sae.encode(update[0].flatten(1).T.to(sae.b_dec.device, torch.float32))
            self._codes[key] = Code(*(part.cpu() for part in code))
            if not self._codes[key].values.isfinite().all():
                raise NotFiniteError(f"The block {key.hookpoint}", update.dtype)
            self._grids[key.hookpoint] = (update.shape[-2], update.shape[-1])

    def trace(self) -> CodeTrace:
        """The codes recorded so far."""
        n_steps = 1 + max((key.step for key in self._codes if key.step is not None), default=-1)
        return CodeTrace(self._codes, self._grids, n_steps)


def load_saes(source: str | Path | Collection, model: Diffuser) -> dict[SaeSite, SparseAutoencoder]:
    """The SAEs for all times at a model's hookpoints, in the order of the hookpoints, on the model's device.

    If there are none, as in collections of other libraries, those at any block of its U-Net.

    Raises:
        ArtifactError: There is none.
    """
    collection = find_collection(source)
    ids = [sae_id for sae_id in collection.ids if sae_id.t == "all"]
    found = _at(model.hookpoints, ids) or (_at(cross_attention_blocks(model.unet), ids) if ids else [])
    if found:
        return {SaeSite(i.hookpoint, i.branch): load_sae(collection, *i, device=model.device) for i in found}
    if not collection.ids:
        raise ArtifactError(collection.missing(SaeId(model.hookpoints[0], "cond", "all")))
    others = ", ".join(sae_id.path for sae_id in collection.ids)
    raise ArtifactError(
        f"{collection.name} has no SAE for all times at {', '.join(model.hookpoints)}. All of them: {others}."
    )


def _at(hookpoints: Sequence[str], ids: Sequence[SaeId]) -> list[SaeId]:
    return [sae_id for hookpoint in hookpoints for sae_id in ids if sae_id.hookpoint == hookpoint]


@torch.no_grad()
def trace_image(
    model: Diffuser,
    image: Image.Image | str | Path,
    prompt: str,
    saes: Mapping[SaeSite, SparseAutoencoder],
    *,
    seed: int = 0,
    num_inference_steps: int | None = None,
) -> CodeTrace:
    """The trace of a given image, noised to the noise level of each sampler step.

    The same noise is used at every step. Both branches are recorded; no guidance is applied.

    Args:
        model: The model.
        image: The image, of any size.
        prompt: The prompt of the conditional branch.
        saes: The SAEs to encode with.
        seed: Seed of the noise.
        num_inference_steps: Steps of the sampler; by default the model's own.
    """
    n_steps = model.spec.num_inference_steps if num_inference_steps is None else num_inference_steps
    alphas, _ = model.schedule.sampler_alphas(n_steps)
    tracer = CodeTracer(model, saes)
    texts: tuple[tuple[Branch, str], ...] = (("uncond", ""), ("cond", prompt))
    with model.busy():
        clean = model.encode(image)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean.device)
        for step, abar in enumerate(torch.from_numpy(alphas)):
            noisy = abar.sqrt().float() * clean + (1 - abar).sqrt().float() * noise
            for branch, text in texts:
                see = partial(_record_as, tracer, branch, step)
                with record(model, tracer.hookpoints, sink=see, outputs=tracer.outputs):
                    model.predict_noise(noisy, abar.logit()[None], model.encode_text([text]))
    return tracer.trace()


def _record_as(tracer: CodeTracer, branch: Branch, step: int, key: ActivationKey, update: Tensor) -> None:
    """Record an update under its true branch and step: outside the sampler, every call counts as "cond" without one."""
    tracer.see(key._replace(branch=branch, step=step), update)
