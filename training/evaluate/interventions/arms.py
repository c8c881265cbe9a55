"""Requested changes to images, and the arms that are compared: edits, prompts, and the formula of Tinaz et al. 2025.

Tinaz et al. (arXiv 2504.15473, section 5) add beta_ij times the concepts' decoder rows to the conditional branch of the
middle block, in a region or everywhere, and subtract the concepts' own contribution outside the region. They use one
SAE per stage; here the SAE for all times is used instead.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from core.activations.hooks import ActivationKey, edit
from core.concepts.trace import SaeSite
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import SamplerState, StepContext
from core.edits import ConceptEdit, Editor, GlobalEdit, RegionName, RemoveEdit, SpatialEdit
from core.edits.editor import latents_labelled
from core.edits.regions import RegionMask
from core.edits.site import values_of
from training.picturebook.world.world import (
    BACKGROUND_INDEX,
    BACKGROUNDS,
    NOUN_INDEX,
    NOUNS,
    OBJECT_INDEX,
    OBJECTS,
    STYLES,
)

Kind = Literal["moving", "styling", "removing"]
Method = Literal["no edit", "prompt-only baseline", "prompt switched", "Tinaz et al. 2025", "edit"]

QUARTERS: tuple[RegionName, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")
OBJECT_NAMES = tuple(noun.name for noun in NOUNS if len(noun.objects) == 1)
"""Nouns that name one object."""


class Request(NamedTuple):
    """One change requested of one image."""

    kind: Kind
    object_name: str
    """The only object in the image."""
    target: str
    """The quarter it should be in, or the style the image should have; empty if the object should be removed."""
    seed: int
    """Seed of the image."""

    @property
    def prompt(self) -> str:
        """The image's caption, without the target."""
        return f"a {self.object_name} {_where(self.object_name)}"

    @property
    def prompt_with_target(self) -> str:
        """The caption with the target written into it. The grammar has no words for quarters, only for sides."""
        if self.kind == "styling":
            return f"a {self.target} picture of {self.prompt}"
        if self.kind == "removing":
            return _where(self.object_name)
        vertical, horizontal = self.target.split("-")
        return f"a {self.object_name} {horizontal} {_VERTICAL[vertical]} {_where(self.object_name)}"


_VERTICAL = {"top": "above", "bottom": "below"}


class Arm(NamedTuple):
    """A method with its steps and strength."""

    method: Method
    steps: tuple[int, int] | None = None
    """First and last step; None if it has none to choose."""
    strength: float | None = None
    """Strength of an edit, or beta of the formula of Tinaz et al."""
    stage: str = ""
    """Name of the stage that the steps form, if any."""

    def edit(self, request: Request) -> ConceptEdit:
        """The edit that realises a request."""
        if self.strength is None or self.steps is None:
            raise ValueError(f"{self.method!r} is not an edit.")
        if request.kind == "moving":
            return SpatialEdit(
                label=request.object_name, region=request.target, strength=self.strength, steps=self.steps
            )
        if request.kind == "removing":
            return RemoveEdit(label=request.object_name, strength=self.strength, steps=self.steps)
        return GlobalEdit(label=request.target, strength=self.strength, steps=self.steps)


def make_requests(kind: Kind, objects: Sequence[str], seeds: range, n_targets: int | None = None) -> list[Request]:
    """All targets and seeds of each object, in this order; every object has seeds of its own."""
    targets = {"moving": QUARTERS, "styling": STYLES[1:], "removing": ("",)}[kind][:n_targets]
    return [
        Request(kind, object_name, target, 1000 * OBJECT_NAMES.index(object_name) + seed)
        for object_name in objects
        for target in targets
        for seed in seeds
    ]


class Unedited:
    """Sampler runs without any edit, from which an arm that starts late continues."""

    def __init__(self, model: Diffuser, n_steps: int, batch_size: int) -> None:
        self.n_steps, self.batch_size = n_steps, batch_size
        self._model = model
        self._step_contexts: list[StepContext] = []
        self._latents: dict[tuple[str, int], Tensor] = {}
        """[n_steps, C, h, w] by object and seed: an object's prompt does not depend on the target."""

    def add(self, requests: Sequence[Request]) -> None:
        """Sample those that were not sampled yet."""
        by_image = {(one.object_name, one.seed): one for one in requests}
        new = [one for key, one in by_image.items() if key not in self._latents]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            prompts, seeds = [one.prompt for one in part], [one.seed for one in part]
            states = list(self._model.sample(prompts, seeds=seeds, num_inference_steps=self.n_steps))
            self._step_contexts = [state.step_context for state in states]
            latents = torch.stack([state.x for state in states], dim=1)
            self._latents |= {(one.object_name, one.seed): latents[i] for i, one in enumerate(part)}

    def after(self, requests: Sequence[Request], step: int) -> SamplerState:
        """The state of these requests' images after a step."""
        self.add(requests)
        x = torch.stack([self._latents[one.object_name, one.seed][step] for one in requests])
        return SamplerState(self._step_contexts[step], x, x)


def draw_arm(editor: Editor, arm: Arm, requests: Sequence[Request], unedited: Unedited) -> Iterator[Image.Image]:
    """The image of each request."""
    model, n_steps = editor.model, unedited.n_steps
    for start in range(0, len(requests), unedited.batch_size):
        part = requests[start : start + unedited.batch_size]
        if arm.method == "no edit":
            yield from model.decode(unedited.after(part, n_steps - 1).x)
            continue
        prompts = [one.prompt_with_target if arm.method == "prompt-only baseline" else one.prompt for one in part]
        contexts = [] if arm.steps is None else [context(editor, arm, part, n_steps)]
        after = unedited.after(part, arm.steps[0] - 1) if arm.steps is not None and arm.steps[0] else None
        seeds = [one.seed for one in part]
        *_, last = model.sample(prompts, seeds=seeds, num_inference_steps=n_steps, after=after, contexts=contexts)
        yield from model.decode(last.x)


def context(editor: Editor, arm: Arm, requests: Sequence[Request], n_steps: int) -> AbstractContextManager[Any]:
    """The context the sampler enters for an arm."""
    if arm.method == "edit":
        return editor.editing_each([[arm.edit(one)] for one in requests], n_steps)
    if arm.method == "Tinaz et al. 2025":
        return tinaz(editor, arm, requests)
    if arm.method == "prompt switched" and arm.steps is not None:
        return switched(editor.model, [one.prompt_with_target for one in requests], arm.steps[0])
    raise ValueError(f"{arm.method!r} needs no context.")


def tinaz(editor: Editor, arm: Arm, requests: Sequence[Request]) -> AbstractContextManager[Any]:
    """The edit of Tinaz et al. 2025, with beta the arm's strength."""
    model = editor.model
    if arm.strength is None or arm.steps is None:
        raise ValueError("Tinaz et al. 2025 needs a strength and steps.")
    beta, site = arm.strength, SaeSite(model.spec.default_hookpoint, "cond")
    sae = editor.saes[site]
    table = editor.table(site)
    chosen = [
        torch.tensor(latents_labelled(table, one.target if one.kind == "styling" else one.object_name))
        for one in requests
    ]

    def change(_: ActivationKey, update: Tensor) -> Tensor:
        new = update.clone()
        for row, (one, numbers) in enumerate(zip(requests, chosen, strict=True)):
            height, width = update.shape[2:]
            code = sae.encode(update[row].flatten(1).T)
            norm = code.values.norm(dim=1, keepdim=True)
            directions = sae.W_dec.detach()[numbers]
            if one.kind == "styling":
                added = beta * norm / norm.sum() * directions.sum(0)
            else:
                inside = RegionMask(one.target or "all", model.image_size).grid(height, width)
                values = values_of(code, numbers, sae.cfg.d_sae)
                added = inside * beta * norm * directions.sum(0) - (1 - inside) * (values @ directions)
            new[row] += added.T.view(update.shape[1:])
        return new

    first, last = arm.steps
    return edit(model, change, [site.hookpoint], branches=[site.branch], steps=range(first, last + 1))


@contextmanager
def switched(model: Diffuser, prompts: Sequence[str], first: int) -> Iterator[None]:
    """Replace the prompts of a batch of the same size from step `first` on."""
    embeddings = model.text_embeddings(prompts)

    def change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if model.step_context is not None and model.step_context.step >= first:
            texts = kwargs["encoder_hidden_states"].clone()
            texts[-len(embeddings) :] = embeddings  # the conditional branch comes last
            kwargs = kwargs | {"encoder_hidden_states": texts}
        return args, kwargs

    handle = model.unet.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def labelled_objects(editor: Editor, n: int) -> tuple[str, ...]:
    """`n` of the objects for which the middle block's conditional branch has concepts, evenly spaced among them."""
    site = SaeSite(editor.model.spec.default_hookpoint, "cond")
    found = [object_name for object_name in OBJECT_NAMES if latents_labelled(editor.table(site), object_name)]
    if n > len(found):
        raise ValueError(f"There are concepts of {len(found)} objects; {n} were asked for.")
    return tuple(found[i * len(found) // n] for i in range(n))


def _where(noun: str) -> str:
    known = OBJECTS[OBJECT_INDEX[NOUNS[NOUN_INDEX[noun]].objects[0]]]
    background = BACKGROUNDS[BACKGROUND_INDEX[known.homes[0]]]
    return f"{background.preposition} the {background.name}"
