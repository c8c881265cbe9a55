"""What is asked of pictures, and the ways of getting it: by edits, by the prompt, by the published formula.

The published formula is that of Tinaz et al. 2025 (arXiv 2504.15473, section 5): on the text half of the middle block
beta_ij times the concepts' decoder rows are added, in a region or everywhere; outside the region the concepts' values
are taken away. There are no SAEs of single times for each stage here: the one for all times stands for them.
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
Method = Literal["no edit", "prompt", "prompt from there on", "published formula", "edit"]

QUARTERS: tuple[RegionName, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")
OBJECT_NAMES = tuple(noun.name for noun in NOUNS if len(noun.objects) == 1)
"""Nouns that mean one thing."""


class Request(NamedTuple):
    """One change that is asked of one picture."""

    kind: Kind
    object_name: str
    """The only thing in the picture."""
    target: str
    """The quarter where it should be, or the style that the picture should have; empty where it should go."""
    seed: int

    @property
    def prompt(self) -> str:
        """The picture's caption, which says nothing of the wish."""
        return f"a {self.object_name} {_where(self.object_name)}"

    @property
    def prompt_with_target(self) -> str:
        """The caption with the wish written into it. The grammar has no words for quarters, only for sides."""
        if self.kind == "styling":
            return f"a {self.target} picture of {self.prompt}"
        if self.kind == "removing":
            return _where(self.object_name)
        vertical, horizontal = self.target.split("-")
        return f"a {self.object_name} {horizontal} {_VERTICAL[vertical]} {_where(self.object_name)}"


_VERTICAL = {"top": "above", "bottom": "below"}


class Arm(NamedTuple):
    """A way of getting what is asked."""

    method: Method
    steps: tuple[int, int] | None = None
    """First and last step; None where there are none to choose."""
    strength: float | None = None
    """Of an edit, or the beta of the published formula."""
    stage: str = ""
    """The stage that the steps are."""

    def edit(self, request: Request) -> ConceptEdit:
        """The edit of a request."""
        if self.strength is None or self.steps is None:
            raise ValueError(f"{self.method!r} is no edit.")
        if request.kind == "moving":
            return SpatialEdit(
                label=request.object_name, region=request.target, strength=self.strength, steps=self.steps
            )
        if request.kind == "removing":
            return RemoveEdit(label=request.object_name, strength=self.strength, steps=self.steps)
        return GlobalEdit(label=request.target, strength=self.strength, steps=self.steps)


def requests(kind: Kind, objects: Sequence[str], seeds: range, n_targets: int | None = None) -> list[Request]:
    """For each thing all its wishes, for each wish all its seeds, of which each thing has others."""
    targets = {"moving": QUARTERS, "styling": STYLES[1:], "removing": ("",)}[kind][:n_targets]
    return [
        Request(kind, object_name, target, 1000 * OBJECT_NAMES.index(object_name) + seed)
        for object_name in objects
        for target in targets
        for seed in seeds
    ]


class Unedited:
    """The sampler's runs without any edit: where an edit begins late, its picture goes on from there."""

    def __init__(self, model: Diffuser, n_steps: int, batch_size: int) -> None:
        self.n_steps, self.batch_size = n_steps, batch_size
        self._model = model
        self._step_contexts: list[StepContext] = []
        self._latents: dict[tuple[str, int], Tensor] = {}
        """[n_steps, C, h, w] by thing and seed: a thing has one prompt, whatever is wished."""

    def know(self, asked: Sequence[Request]) -> None:
        """Draw those that were not drawn yet."""
        new = list(
            {
                (one.object_name, one.seed): one for one in asked if (one.object_name, one.seed) not in self._latents
            }.values()
        )
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            prompts, seeds = [one.prompt for one in part], [one.seed for one in part]
            states = list(self._model.sample(prompts, seeds=seeds, num_inference_steps=self.n_steps))
            self._step_contexts = [state.step_context for state in states]
            latents = torch.stack([state.x for state in states], dim=1)
            self._latents |= {(one.object_name, one.seed): latents[i] for i, one in enumerate(part)}

    def after(self, asked: Sequence[Request], step: int) -> SamplerState:
        """The batch of these requests after a step."""
        self.know(asked)
        x = torch.stack([self._latents[one.object_name, one.seed][step] for one in asked])
        return SamplerState(self._step_contexts[step], x, x)


def draw_arm(editor: Editor, arm: Arm, asked: Sequence[Request], unedited: Unedited) -> Iterator[Image.Image]:
    """The picture of each request."""
    model, n_steps = editor.model, unedited.n_steps
    for start in range(0, len(asked), unedited.batch_size):
        part = asked[start : start + unedited.batch_size]
        if arm.method == "no edit":
            yield from model.decode(unedited.after(part, n_steps - 1).x)
            continue
        prompts = [one.prompt_with_target if arm.method == "prompt" else one.prompt for one in part]
        contexts = [] if arm.steps is None else [context(editor, arm, part, n_steps)]
        after = unedited.after(part, arm.steps[0] - 1) if arm.steps is not None and arm.steps[0] else None
        seeds = [one.seed for one in part]
        *_, last = model.sample(prompts, seeds=seeds, num_inference_steps=n_steps, after=after, contexts=contexts)
        yield from model.decode(last.x)


def context(editor: Editor, arm: Arm, asked: Sequence[Request], n_steps: int) -> AbstractContextManager[Any]:
    """What the sampler has to enter for an arm."""
    if arm.method == "edit":
        return editor.editing_each([[arm.edit(one)] for one in asked], n_steps)
    if arm.method == "published formula":
        return published(editor, arm, asked)
    if arm.method == "prompt from there on" and arm.steps is not None:
        return switched(editor.model, [one.prompt_with_target for one in asked], arm.steps[0])
    raise ValueError(f"{arm.method!r} needs no context.")


def published(editor: Editor, arm: Arm, asked: Sequence[Request]) -> AbstractContextManager[Any]:
    """The published formula, with beta the arm's strength."""
    model = editor.model
    if arm.strength is None or arm.steps is None:
        raise ValueError("The published formula needs a strength and steps.")
    beta, site = arm.strength, SaeSite(model.spec.default_hookpoint, "cond")
    sae = editor.saes[site]
    table = editor.table(site)
    chosen = [
        torch.tensor(latents_labelled(table, one.target if one.kind == "styling" else one.object_name)) for one in asked
    ]

    def change(_: ActivationKey, update: Tensor) -> Tensor:
        new = update.clone()
        for row, (one, numbers) in enumerate(zip(asked, chosen, strict=True)):
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
    """Other prompts for a batch of the same size, from a step on."""
    embeddings = model.text_embeddings(prompts)

    def change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if model.step_context is not None and model.step_context.step >= first:
            texts = kwargs["encoder_hidden_states"].clone()
            texts[-len(embeddings) :] = embeddings  # the half with the prompts comes last
            kwargs = kwargs | {"encoder_hidden_states": texts}
        return args, kwargs

    handle = model.unet.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def labelled_objects(editor: Editor, n: int) -> tuple[str, ...]:
    """So many of the things that the middle block's text half has concepts for, spread over all of them."""
    site = SaeSite(editor.model.spec.default_hookpoint, "cond")
    found = [object_name for object_name in OBJECT_NAMES if latents_labelled(editor.table(site), object_name)]
    if n > len(found):
        raise ValueError(f"Concepts carry the labels of {len(found)} things; {n} were asked for.")
    return tuple(found[i * len(found) // n] for i in range(n))


def _where(noun: str) -> str:
    object_name = OBJECTS[OBJECT_INDEX[NOUNS[NOUN_INDEX[noun]].objects[0]]]
    site = BACKGROUNDS[BACKGROUND_INDEX[object_name.homes[0]]]
    return f"{site.preposition} the {site.name}"
