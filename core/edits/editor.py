"""From edits to a context for one run of the sampler."""

import difflib
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.activations.hooks import BRANCHES, ActivationKey, Editing, edit
from core.arguments import as_items
from core.arrays import Float32s
from core.concepts.table import N_NEAREST, ConceptTable, load_concepts
from core.concepts.trace import SaeSite, load_saes
from core.diffusion.diffuser import Diffuser
from core.edits.base import BaseEdit, SelectedLatents, Target, window_of
from core.edits.regions import RegionMask
from core.edits.site import EditAtSite, SiteEdits
from core.sae.autoencoder import SparseAutoencoder, output_hookpoints
from core.sae.collection import find_collection

MIN_EFFECT = 0.01
"""Latents that a word moves by less than this share of the latent it moves most are not edited."""

_Selection = tuple[BaseEdit, slice, tuple[int, ...]]
"""An edit, the images of the batch that it is for, and its latents at one site."""


class Editor:
    """Turns edits into contexts for the sampler, with the SAEs and concept tables of one model."""

    def __init__(
        self,
        model: Diffuser,
        saes: Mapping[SaeSite, SparseAutoencoder],
        table: Callable[[SaeSite], ConceptTable],
    ) -> None:
        """`saes` are those for all times, on the model's device; `table` loads the concepts of a site, once."""
        self.model, self.saes = model, saes
        self._load, self._tables = table, dict[SaeSite, ConceptTable]()

    def table(self, site: SaeSite) -> ConceptTable:
        """The concept table of a site."""
        if site not in self._tables:
            self._tables[site] = self._load(site)
        return self._tables[site]

    def editing(self, edits: Sequence[BaseEdit], num_inference_steps: int | None = None) -> Editing:
        """A context for one run of `model.generate` or `model.sample` that edits every image of the batch alike.

        Edits act in order, each on what the one before left.

        Args:
            edits: The edits; those of strength 0 do nothing.
            num_inference_steps: Steps of the run; by default the model's own.

        Raises:
            ModelError: A hookpoint that the model does not have.
            ValueError: No such label (the nearest are named), concept, stage, branch or step; a strength that is
                negative or not finite; a region that is empty or of another size.
        """
        return self._editing([(one, slice(None)) for one in edits], num_inference_steps)

    def editing_each(self, edits: Sequence[Sequence[BaseEdit]], num_inference_steps: int | None = None) -> Editing:
        """As `editing`, with a list of edits for each image of the batch."""
        return self._editing(
            [(one, slice(row, row + 1)) for row, of_row in enumerate(edits) for one in of_row], num_inference_steps
        )

    def concepts(self, one: BaseEdit) -> dict[SaeSite, tuple[int, ...]]:
        """The latents that an edit acts on, by site; sites without any are left out.

        Raises:
            ValueError: No concept has the label, or there is no latent of such a number.
        """
        if (one.label is None) == (not one.concepts):
            raise ValueError("An edit needs either a label or concepts: give one of the two.")
        sites = self._sites(one)
        if one.label is None:
            return self._numbered(one.concepts, sites)
        wanted = _normalised(one.label)
        found = {site: self._of_label(one, site, wanted) for site in sites}
        if not any(found.values()) and one.hookpoints is None:
            # An object may have all its concepts at other hookpoints than the kind's default ones.
            sites = [site for site in self.saes if site.branch in {site.branch for site in sites}]
            found = {site: self._of_label(one, site, wanted) for site in sites}
        if not any(found.values()):
            labels = sorted({label for site in sites for label in self.table(site).labels})
            near = difflib.get_close_matches(wanted, labels, n=N_NEAREST, cutoff=0)
            raise ValueError(f"No concept has the label {one.label!r} there. The nearest: {', '.join(near)}.")
        return {site: numbers for site, numbers in found.items() if numbers}

    def _of_label(self, one: BaseEdit, site: SaeSite, label: str) -> tuple[int, ...]:
        effect = self._word_effect(one, site)
        return latents_labelled(self.table(site), label) if effect is None else latents_moved_by(effect)

    def _word_effect(self, one: BaseEdit, site: SaeSite) -> Float32s | None:
        """[d_sae] effect of the edit's label as a style word, if the edit uses it and it was measured."""
        return self.table(site).effect(_normalised(one.label)) if one.uses_word_effects and one.label else None

    def _sites(self, one: BaseEdit) -> list[SaeSite]:
        """The sites given by the edit's hookpoints and branches, or by the defaults of its kind."""
        branches = one.default_branches if one.branches is None else tuple(as_items(one.branches))
        if not branches or not set(branches) <= set(BRANCHES):
            raise ValueError(
                f"An edit's branches are some of {', '.join(BRANCHES)}, not {', '.join(branches) or 'none'}."
            )
        there = [site for site in self.saes if site.branch in branches]
        if one.hookpoints is None:
            names = self.model.spec.edit_hookpoints(one.default_hookpoints)
            return [site for site in there if site.hookpoint in names] or there
        if not one.hookpoints:
            raise ValueError("The edit's list of hookpoints is empty: name some, or leave it out for the default ones.")
        sites = [SaeSite(hookpoint, branch) for hookpoint in as_items(one.hookpoints) for branch in branches]
        if missing := [site for site in sites if site not in self.saes]:
            raise self._no_sae(missing[0])
        return sites

    def _no_sae(self, site: SaeSite) -> ValueError:
        return ValueError(f"There is no SAE for all times at {site}. There are: {', '.join(map(str, self.saes))}.")

    def _numbered(self, concepts: Sequence[Target | int], sites: Sequence[SaeSite]) -> dict[SaeSite, tuple[int, ...]]:
        found: dict[SaeSite, list[int]] = {}
        for concept in concepts:
            if not isinstance(concept, Target):
                if len(sites) != 1:
                    raise ValueError(
                        "A concept's number is only meaningful at one site: name one hookpoint and one branch."
                    )
                concept = Target(sites[0], concept)
            if concept.site not in self.saes:
                raise self._no_sae(concept.site)
            try:
                found.setdefault(concept.site, []).append(self.table(concept.site).check(concept.number))
            except (IndexError, TypeError) as error:
                raise ValueError(str(error)) from error
        return {site: tuple(dict.fromkeys(numbers)) for site, numbers in found.items()}

    def _editing(self, edits: Sequence[tuple[BaseEdit, slice]], n_steps: int | None) -> Editing:
        n_steps = self.model.spec.num_inference_steps if n_steps is None else n_steps
        selections: dict[SaeSite, list[_Selection]] = {}
        for one, rows in edits:
            one.check()
            window_of(one, n_steps, self.model.spec.stages)
            RegionMask(one.active_region, self.model.image_size)
            for site, numbers in self.concepts(one).items():
                if one.strength:
                    selections.setdefault(site, []).append((one, rows, numbers))
        by_site = {site: self._site_edits(site, of_site, n_steps) for site, of_site in selections.items()}
        steps = {step for of_site in by_site.values() for one in of_site.edits for step in one.steps}

        def change(key: ActivationKey, update: Tensor) -> Tensor | None:
            _check_run(self.model, n_steps)
            of_site = by_site.get(SaeSite(key.hookpoint, key.branch))
            return None if of_site is None else of_site(key, update)

        return edit(
            self.model,
            change if by_site else (),
            dict.fromkeys(site.hookpoint for site in by_site) or None,
            branches={site.branch for site in by_site} or BRANCHES,
            steps=steps or None,
            outputs=output_hookpoints(self.saes),
        )

    def _site_edits(self, site: SaeSite, selections: Sequence[_Selection], n_steps: int) -> SiteEdits:
        device = self.saes[site].b_dec.device
        union = sorted({number for _, _, numbers in selections for number in numbers})
        edits = []
        for one, rows, numbers in selections:
            latents = self._latents(one, site, numbers)
            columns = torch.tensor([union.index(number) for number in numbers], device=device)
            steps = window_of(one, n_steps, self.model.spec.stages)
            region = RegionMask(one.active_region, self.model.image_size)
            edits.append(EditAtSite(one, latents, columns, steps, rows, region))
        return SiteEdits(self.saes[site], torch.tensor(union, device=device), edits)

    def _latents(self, one: BaseEdit, site: SaeSite, numbers: Sequence[int]) -> SelectedLatents:
        frame, device = self.table(site).frame, self.saes[site].b_dec.device
        effect = self._word_effect(one, site)

        def of_latents(values: Float32s) -> Tensor:
            return torch.tensor(values[list(numbers)], dtype=torch.float32, device=device)

        mean, p99, threshold = (of_latents(frame[name].to_numpy()) for name in ("mean", "p99", "threshold"))
        unit = mean if effect is None else of_latents(effect)
        return SelectedLatents(torch.tensor(numbers, device=device), unit, effect is not None, mean, p99, threshold)


def load_editor(model: Diffuser, source: str | Path | None = None) -> Editor:
    """An editor with the SAEs for all times of a collection, by default the model's own; loaded once for each model.

    Raises:
        ArtifactError: There are no such SAEs.
    """
    name = model.spec.name if source is None else source
    of_model = _EDITORS.setdefault(model, {})
    if str(name) not in of_model:
        collection = find_collection(name)
        of_model[str(name)] = Editor(model, load_saes(collection, model), lambda site: load_concepts(collection, *site))
    return of_model[str(name)]


_EDITORS: weakref.WeakKeyDictionary[Diffuser, dict[str, Editor]] = weakref.WeakKeyDictionary()


def latents_labelled(table: ConceptTable, word: str) -> tuple[int, ...]:
    """The latents whose label is a word, or a synonym of it; the word in lower case."""
    words = table.info.words
    labels = [label for label in table.labels if word in map(str.casefold, (label, *words.get(label, ())))]
    return tuple(number for label in labels for number in table.numbers(label))


def latents_moved_by(effect: Float32s) -> tuple[int, ...]:
    """The latents that a word's effect [d_sae] moves noticeably, up or down (see `MIN_EFFECT`)."""
    sizes = np.abs(effect)
    return tuple(np.flatnonzero(sizes > MIN_EFFECT * sizes.max(initial=0.0)).tolist())


def _normalised(label: str) -> str:
    return " ".join(label.casefold().split())


def _check_run(model: Diffuser, n_steps: int) -> None:
    step_context = model.step_context
    if step_context is not None and step_context.n_steps != n_steps:
        raise ValueError(f"The edits were made for {n_steps} steps; this run has {step_context.n_steps}.")
