"""From edits to contexts for the sampler."""

import difflib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from core.activations.hooks import BRANCHES, ActivationKey, Editing, edit
from core.concepts.table import N_NEAREST, ConceptTable, load_concepts
from core.concepts.trace import SaeSite, load_saes
from core.diffusion.diffuser import Diffuser
from core.edits.kinds import Chosen, ConceptEdit, RegionMask, RemoveEdit, ReplaceEdit, Target, check_strength, window_of
from core.sae.autoencoder import Code, SparseAutoencoder
from core.sae.collection import find_collection

_MARGIN = 16
"""The edge that goes with a removed thing is the picture's side over this, in whole cells."""
LEAST_EFFECT = 0.01
"""Concepts that a word moves by less than this share of the one that it moves most are left alone."""


@dataclass(frozen=True, eq=False)
class _Part:
    """An edit at one place, for some pictures of the batch."""

    edit: ConceptEdit
    concepts: Chosen
    columns: Tensor
    """[n] where the concepts are among all that are edited at the place."""
    steps: range
    rows: slice
    """The pictures."""
    inside: RegionMask


class Editor:
    """Turns edits into contexts for the sampler of one model."""

    def __init__(
        self,
        model: Diffuser,
        saes: Mapping[SaeSite, SparseAutoencoder],
        table: Callable[[SaeSite], ConceptTable],
    ) -> None:
        """`saes` are those for all times, on the model's device; `table` gives the concepts of each, asked for once."""
        self.model, self.saes = model, saes
        self._load, self._tables = table, dict[SaeSite, ConceptTable]()

    def table(self, site: SaeSite) -> ConceptTable:
        """The concepts of a place."""
        if site not in self._tables:
            self._tables[site] = self._load(site)
        return self._tables[site]

    def editing(self, edits: Sequence[ConceptEdit], num_inference_steps: int | None = None) -> Editing:
        """A context for one run, of `model.generate` or `model.sample`: every picture of it is edited alike.

        Several edits act in their order, each on what the one before left.

        Args:
            edits: The edits; of strength 0 they are none.
            num_inference_steps: Of the run; by default the model's own.

        Raises:
            ModelError: A hookpoint that the model does not have.
            ValueError: No such label (the nearest are named), concept, stage, branch or step; a strength that is not
                finite or below 0; an empty region or one of another size; patches that were not recorded.
        """
        return self._editing([(one, slice(None)) for one in edits], num_inference_steps)

    def editing_each(self, edits: Sequence[Sequence[ConceptEdit]], num_inference_steps: int | None = None) -> Editing:
        """The same with edits of its own for each picture of a batch."""
        return self._editing(
            [(one, slice(row, row + 1)) for row, of_row in enumerate(edits) for one in of_row], num_inference_steps
        )

    def concepts(self, one: ConceptEdit) -> dict[SaeSite, tuple[int, ...]]:
        """The concepts that an edit acts on, by place; places without any are left out.

        Raises:
            ValueError: No concept carries the label, or there is none of a number.
        """
        if (one.label is None) == (not one.concepts):
            raise ValueError("An edit needs either a label or concepts: give one of the two.")
        sites = self._sites(one)
        if one.label is None:
            return self._numbered(one.concepts, sites)
        wanted = _word(one.label)
        found = {site: self._of_label(one, site, wanted) for site in sites}
        if not any(found.values()) and one.hookpoints is None:
            # A thing may have its concepts elsewhere than what such edits mostly raise.
            sites = [site for site in self.saes if site.branch in {site.branch for site in sites}]
            found = {site: self._of_label(one, site, wanted) for site in sites}
        if not any(found.values()):
            labels = sorted({label for site in sites for label in self.table(site).labels})
            near = difflib.get_close_matches(wanted, labels, n=N_NEAREST, cutoff=0)
            raise ValueError(f"No concept carries the label {one.label!r} there. The nearest: {', '.join(near)}.")
        return {site: numbers for site, numbers in found.items() if numbers}

    def _of_label(self, one: ConceptEdit, site: SaeSite, label: str) -> tuple[int, ...]:
        effect = self._effect(one, site)
        return latents_labelled(self.table(site), label) if effect is None else latents_moved_by(effect)

    def _effect(self, one: ConceptEdit, site: SaeSite) -> NDArray[np.float32] | None:
        """[d_sae] what the word of a style does, if the edit is of one."""
        return self.table(site).effect(_word(one.label)) if one.by_word and one.label is not None else None

    def _sites(self, one: ConceptEdit) -> list[SaeSite]:
        """Where the edit may act by its hookpoints and branches, or by what was measured to serve best."""
        branches = one.default_branches if one.branches is None else tuple(one.branches)
        if not branches or not set(branches) <= set(BRANCHES):
            raise ValueError(
                f"An edit's branches are some of {', '.join(BRANCHES)}, not {', '.join(branches) or 'none'}."
            )
        there = [site for site in self.saes if site.branch in branches]
        if one.hookpoints is None:
            names = self.model.hookpoints[one.default_hookpoints]
            return [site for site in there if site.hookpoint in names] or there
        if not one.hookpoints:
            raise ValueError("An edit's hookpoints are none: name some, or leave them out for those that serve best.")
        sites = [SaeSite(hookpoint, branch) for hookpoint in one.hookpoints for branch in branches]
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
                    raise ValueError("A number means a concept of one place: name one hookpoint and one branch.")
                concept = Target(sites[0], concept)
            if concept.site not in self.saes:
                raise self._no_sae(concept.site)
            try:
                found.setdefault(concept.site, []).append(self.table(concept.site).check(concept.number))
            except (IndexError, TypeError) as error:
                raise ValueError(str(error)) from error
        return {site: tuple(dict.fromkeys(numbers)) for site, numbers in found.items()}

    def _editing(self, edits: Sequence[tuple[ConceptEdit, slice]], n_steps: int | None) -> Editing:
        n_steps = self.model.spec.num_inference_steps if n_steps is None else n_steps
        wanted: dict[SaeSite, list[tuple[ConceptEdit, slice, tuple[int, ...]]]] = {}
        for one, rows in edits:
            check_strength(one)
            window_of(one, n_steps, self.model.spec.stages)
            RegionMask(one.where, self.model.image_size)
            for site, numbers in self.concepts(one).items():
                if one.strength:
                    wanted.setdefault(site, []).append((one, rows, numbers))
        placed = {site: self._placed(site, of_site, n_steps) for site, of_site in wanted.items()}
        steps = {step for of_site in placed.values() for part in of_site.parts for step in part.steps}

        def change(key: ActivationKey, update: Tensor) -> Tensor | None:
            _check_run(self.model, n_steps)
            of_site = placed.get(SaeSite(key.hookpoint, key.branch))
            return None if of_site is None else of_site(key, update)

        return edit(
            self.model,
            change if placed else (),
            dict.fromkeys(site.hookpoint for site in placed) or None,
            branches={site.branch for site in placed} or BRANCHES,
            steps=steps or None,
        )

    def _placed(
        self, site: SaeSite, edits: Sequence[tuple[ConceptEdit, slice, tuple[int, ...]]], n_steps: int
    ) -> "_Placed":
        sae, frame = self.saes[site], self.table(site).frame
        union = sorted({number for _, _, numbers in edits for number in numbers})
        parts = []
        for one, rows, numbers in edits:
            effect = self._effect(one, site)
            mean, most, threshold, unit = (
                torch.tensor(values[list(numbers)], dtype=torch.float32, device=sae.b_dec.device)
                for values in (
                    *(frame[name].to_numpy() for name in ("mean", "p99", "threshold")),
                    frame["mean"].to_numpy() if effect is None else effect,
                )
            )
            named = torch.tensor(numbers, device=sae.b_dec.device)
            chosen = Chosen(named, unit, effect is not None, mean, most, threshold)
            columns = torch.tensor([union.index(number) for number in numbers], device=sae.b_dec.device)
            steps = window_of(one, n_steps, self.model.spec.stages)
            parts.append(_Part(one, chosen, columns, steps, rows, RegionMask(one.where, self.model.image_size)))
        return _Placed(sae, torch.tensor(union, device=sae.b_dec.device), parts)


class _Placed:
    """All edits at one place: from an update to another."""

    def __init__(self, sae: SparseAutoencoder, union: Tensor, parts: Sequence[_Part]) -> None:
        self._sae, self._union, self.parts = sae, union, parts
        self._directions = sae.W_dec.detach()[union]

    @torch.no_grad()
    def __call__(self, key: ActivationKey, update: Tensor) -> Tensor | None:
        parts = [part for part in self.parts if key.step in part.steps]
        if not parts:
            return None
        n, channels, height, width = update.shape
        x = update.float().flatten(2).transpose(1, 2)  # [B, P, C]
        code = self._sae.encode(x.reshape(-1, channels).to(self._sae.b_dec.device))
        z = values_of(code, self._union, self._sae.cfg.d_sae).view(n, height * width, -1)
        new, exchanged, moved_any = z.clone(), x, False
        for part in parts:
            inside = part.inside.grid(height, width).to(z.device)
            now = new[part.rows][..., part.columns]
            if isinstance(part.edit, ReplaceEdit) and part.edit.patches is not None:
                exchanged = _exchange(part, part.edit.patches, key, now, inside, exchanged)
            elif isinstance(part.edit, RemoveEdit) and not part.concepts.of_word:
                exchanged = _remove(part, now, inside, exchanged, width)
            else:
                new[part.rows, :, part.columns] = part.edit.change(now, part.concepts, inside)
                moved_any = True
        changed = exchanged + ((new - z) @ self._directions).to(x.device) if moved_any else exchanged
        return changed.transpose(1, 2).reshape(update.shape)


def load_editor(model: Diffuser, source: str | Path | None = None) -> Editor:
    """An editor by the SAEs for all times of a collection, the model's own by default; each is loaded once a model.

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


def values_of(code: Code, numbers: Tensor, d_sae: int) -> Tensor:
    """[N, n] values of some latents in a code, 0 where they are not active."""
    dense = torch.zeros(len(code.values), d_sae, dtype=code.values.dtype, device=code.values.device)
    # Empty entries of a code have the index -1 and the value 0: added anywhere they change nothing.
    return dense.scatter_add_(1, code.indices.clamp_min(0), code.values)[:, numbers]


def latents_labelled(table: ConceptTable, word: str) -> tuple[int, ...]:
    """The concepts whose label is a word, or has it among its other words."""
    words = table.info.words
    labels = [label for label in table.labels if word in map(str.casefold, (label, *words.get(label, ())))]
    return tuple(number for label in labels for number in table.numbers(label))


def latents_moved_by(effect: NDArray[np.float32]) -> tuple[int, ...]:
    """The concepts that a word raises or lowers by more than hardly at all."""
    sizes = np.abs(effect)
    return tuple(np.flatnonzero(sizes > LEAST_EFFECT * sizes.max(initial=0.0)).tolist())


def _word(label: str) -> str:
    return " ".join(label.casefold().split())


def _exchange(
    part: _Part, patches: Mapping[ActivationKey, Tensor], key: ActivationKey, z: Tensor, inside: Tensor, x: Tensor
) -> Tensor:
    """x [B, P, C] with another run's update wherever one of the concepts is there."""
    if key not in patches:
        raise ValueError(f"The patches to exchange hold nothing of {tuple(key)}: record that run with the same steps.")
    other = patches[key].float().flatten(2).transpose(1, 2).to(x.device)
    there = ((z > 0) & (z >= part.concepts.threshold)).any(-1, keepdim=True)
    weight = (min(part.edit.strength, 1.0) * inside * there).to(x.device)
    new = x.clone()
    new[part.rows] += weight * (other - x[part.rows])
    return new


def _remove(part: _Part, z: Tensor, inside: Tensor, x: Tensor, width: int) -> Tensor:
    """x [B, P, C] with what is beside the concepts, in the same row, wherever one of them is there."""
    height = x.shape[1] // width
    rows = x[part.rows].view(-1, height, width, x.shape[2])
    there = (z > 0).any(-1).view(-1, height, width)
    # What a thing does to the cells around it belongs to it; a cell of a coarse grid has that in itself already.
    reach = height // _MARGIN
    there = F.max_pool2d(there.float(), 2 * reach + 1, 1, reach)[..., None].to(x.device)
    beside = 1 - there
    n_beside = beside.sum(2)  # [B, h, 1]
    everywhere = (rows * beside).sum((1, 2)) / beside.sum((1, 2)).clamp_min(1)
    of_row = (rows * beside).sum(2) / n_beside.clamp_min(1)
    of_row = torch.where(n_beside > 0, of_row, everywhere[:, None])
    weight = part.edit.strength * inside.view(height, width, 1).to(x.device) * there
    weight = weight * beside.amax((1, 2), keepdim=True)  # a thing that is everywhere has nothing beside it
    new = x.clone()
    new[part.rows] = (rows + weight * (of_row[:, :, None] - rows)).flatten(1, 2)
    return new


def _check_run(model: Diffuser, n_steps: int) -> None:
    step_context = model.step_context
    if step_context is not None and step_context.n_steps != n_steps:
        raise ValueError(f"The edits were made for {n_steps} steps; this run has {step_context.n_steps}.")
