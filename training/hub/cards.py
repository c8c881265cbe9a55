"""The cards and the manifest of a collection of SAEs: what they are, how good, and how to load them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from core.artifacts import MANIFEST, file_sha256
from core.concepts.gallery import FOLDER
from core.concepts.io import COUNTS, EXAMPLES, TABLE, weights_sha256
from core.diffusion.schedule import step_at
from core.files import write_text
from core.sae.autoencoder import SaeId
from core.sae.collection import INDEX, Collection, find_collection
from core.sae.io import CONFIG, SPARSIFY_WEIGHTS, WEIGHTS
from core.spec import BUILT_IN, ModelSpec, default_hookpoint
from training.common.report import Table

CARD = "README.md"
SAE_FILES = (CONFIG, WEIGHTS, SPARSIFY_WEIGHTS)
"""What an SAE's folder may hold of the SAE."""
TABLE_FILES = (TABLE, COUNTS, EXAMPLES)
"""What it may hold of its concepts."""
LICENSE = "apache-2.0"
MEASURED = "## How good they are"
"""Heading of the last section of a collection's card: the tables of the evaluation."""
Line = dict[str, Any]
"""Of a manifest."""


def write_sae_card(root: Path, source: str, tables: Sequence[Table]) -> None:
    """Write both into the collection's folder.

    source: what `core.load_sae` calls the collection.
    tables: those of `training.evaluate.sae.evaluation`; the figures of the first go into the manifest too.
    """
    collection = find_collection(root)
    lines = manifest_lines(root, collection.ids, tables[0].details["figures"])
    write_text(root / MANIFEST, manifest_text(lines))
    sections = "\n".join(table.markdown().replace("## ", "### ", 1) for table in tables)
    write_text(root / CARD, sae_card(collection, source, lines, sections))


def manifest_lines(root: Path, ids: Sequence[SaeId], figures: Mapping[str, Any]) -> list[Line]:
    """A line an SAE, with its figures and the hashes of its files; the last is the gallery's, if there is one."""
    lines: list[Line] = []
    for sae_id in ids:
        folder, config = root / sae_id.path, json.loads((root / sae_id.path / CONFIG).read_text(encoding="utf-8"))
        line = {
            "path": sae_id.path,
            **{key: config[key] for key in ("architecture", "d_in", "d_sae", "k") if key in config},
            "sha256": weights_sha256(folder),
            "metrics": figures.get(sae_id.path),
            "labelled_share": labelled_share(folder / TABLE),
            **{key: config["metadata"].get(key) for key in ("n_samples", "seed", "commit")},
            "files": _hashes(folder, [name for name in (*SAE_FILES, *TABLE_FILES) if (folder / name).is_file()]),
        }
        lines.append(line)
    gallery = sorted(path.name for path in (root / FOLDER).glob("*") if path.is_file())
    return [*lines, {"path": FOLDER, "files": _hashes(root / FOLDER, gallery)}] if gallery else lines


def manifest_text(lines: Sequence[Line]) -> str:
    """The file of a manifest."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def labelled_share(table: Path) -> float | None:
    """Share of an SAE's latents that have a label; None without a table."""
    if not table.is_file():
        return None
    labels = pq.read_table(table, columns=["label"])["label"].to_pylist()
    return sum(bool(label) for label in labels) / len(labels)


def config_name(sae_id: SaeId) -> str:
    """What the dataset calls the table of an SAE: no slash may be in it."""
    return sae_id.path.replace("/", "-")


def sae_card(collection: Collection, source: str, lines: Sequence[Line], measured: str, tables: str = "") -> str:
    """The card of the SAEs.

    Args:
        collection: They themselves.
        source: What `core.load_sae` calls them.
        lines: Of the manifest.
        measured: Markdown: the tables of the evaluation.
        tables: The dataset on the Hub with their concepts; none if they lie beside them.
    """
    recipe = collection.index["recipe"]
    name, training, stream = recipe["model"], recipe["training"], recipe["stream"]
    n_samples = training["n_steps"] * training["gradient_accumulation_steps"] * stream["batch_size"]
    spec = BUILT_IN.get(name) or ModelSpec(name=name, source=name)
    where = f"the dataset [{tables}](https://huggingface.co/datasets/{tables})" if tables else "the same folders"
    return f"""---
{_front(spec, tables)}---

# Sparse autoencoders of {name}

Each rebuilds, from a few active latents of many, what one cross-attention block of the denoiser adds to the picture at
one position (its residual update). A latent that keeps meaning the same thing can be looked up, mapped and edited.

```python
{_snippet(collection, spec, source, lines)}```

A folder an SAE, `<hookpoint>/<cond|uncond>/t<time|all>`, in the form of SAELens v6, whose own loader reads it too; fp16
weights of an SAE that computes in fp32. `tall` reads every step of the sampler, so that a latent's number means the
same at each. What the latents are called, and the pictures that show them, are in {where}.
`{MANIFEST}` has a line an SAE: figures, checksums, seed. `python app.py --saes {source}` shows them at work.

{_summary(lines)}
Explained variance (with its 95 % interval over pictures), L0 and the share of dead latents are those on held-out
pictures; labelled: the share of latents that name something better than chance.

## Training

{training["architecture"]} with AuxK, {training["expansion"]} times as many latents as channels, on {n_samples:,}
samples of each block, taken while the sampler drew prompts from `{recipe["prompts"]}`; nothing was stored between. All
settings are under `recipe` in `{INDEX}`.

{MEASURED}

{measured}"""


def concepts_card(collection: Collection, source: str, tables: str, lines: Sequence[Line]) -> str:
    """The card of the dataset `tables`: the concepts of the SAEs that `core.load_sae` calls `source`."""
    name = collection.index["recipe"]["model"]
    ids = [SaeId.parse(line["path"]) for line in lines if line["path"] != FOLDER]
    shown = example_of(ids)
    configs = "".join(
        f"- config_name: {config_name(sae_id)}\n  data_files: {sae_id.path}/{TABLE}\n"
        + "  default: true\n" * (sae_id == shown)
        for sae_id in ids
    )
    return f"""---
license: {LICENSE}
pretty_name: Concepts of {name}
tags: [sparse-autoencoder, diffusion, interpretability]
configs:
{configs}---

# What the latents of {name}'s sparse autoencoders are called

A table an autoencoder of [{source}](https://huggingface.co/{source}), a row a latent: its label and kind, how well the
two fit the masks of what the pictures show (`iou` on the pictures on which the label was chosen, `held_out_iou` on
others, `chance_iou` and `p_value` with the masks of other pictures), how often and how strongly it fires, how spread
out, and when. Latents without a label are kept.

```python
from datasets import load_dataset

load_dataset("{tables}", "{config_name(shown)}", split="train")
```

With their pictures, and beside the autoencoder that they belong to:

```python
import core

table = core.load_concepts("{source}", hookpoint="{shown.hookpoint}", branch="{shown.branch}", t={_time(shown)})
table[0].gallery  # pictures that show it best, each with its map
```

`{COUNTS}` beside a table says how often each latent fires where each class is; `{EXAMPLES}` says which
pictures of `{FOLDER}/` show a latent best, and where.
"""


def _front(spec: ModelSpec, tables: str) -> str:
    """The front matter of the SAEs' card."""
    base = "" if Path(spec.source).is_dir() else f"base_model: {spec.source}\n"
    data = f"datasets:\n- {tables}\n" if tables else ""
    tags = "tags: [sparse-autoencoder, saelens, diffusion, interpretability]\n"
    return f"license: {LICENSE}\nlibrary_name: saelens\n{tags}{base}{data}"


def _snippet(collection: Collection, spec: ModelSpec, source: str, lines: Sequence[Line]) -> str:
    """Python that runs as it stands, where this project is installed."""
    shown = example_of(collection.ids)
    step = step_at(0.5 if shown.t == "all" else shown.t, spec.num_inference_steps)
    place = f'hookpoint="{shown.hookpoint}", branch="{shown.branch}", t={_time(shown)}'
    text = f"""import core
from core.activations.hooks import record

model = core.load_model("{spec.name}")
sae = core.load_sae("{source}", {place})
with record(model, ["{shown.hookpoint}"], steps=[{step}]) as updates:
    model.generate("a cat on the grass", seed=0)
x = updates["{shown.hookpoint}", "{shown.branch}", {step}][0].flatten(1).T  # [positions, channels]
code = sae.encode(x)  # .indices, .values [positions, k]
sae.decode(code)  # close to x
"""
    if not any(line.get("labelled_share") is not None for line in lines):
        return text
    return f"""{text}
table = core.load_concepts("{source}", {place})
table[int(code.indices[0, 0])].label  # what the strongest latent of the first position is called
"""


def _summary(lines: Sequence[Line]) -> str:
    """A row an SAE."""
    rows = []
    for line in lines:
        figures = line.get("metrics")
        if not figures:
            continue
        low, high = figures["explained_variance_low"], figures["explained_variance_high"]
        share = line["labelled_share"]
        cells = (
            f"`{line['path']}`",
            f"{line['k']} of {line['d_sae']:,}" if "k" in line else f"of {line['d_sae']:,}",
            f"{figures['explained_variance']:.3f} ({low:.3f} to {high:.3f})",
            f"{figures['l0']:.3g}",
            f"{100 * figures['dead_share']:.1f} %",
            "no table" if share is None else f"{100 * share:.1f} %",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    head = "| SAE | k | explained variance | L0 | dead | labelled |\n|---|---|---|---|---|---|\n"
    return head + "".join(rows)


def example_of(ids: Sequence[SaeId]) -> SaeId:
    """The SAE that the cards use as their example."""
    hookpoint = default_hookpoint([*dict.fromkeys(sae_id.hookpoint for sae_id in ids)])
    return next(sae_id for sae_id in ids if sae_id.hookpoint == hookpoint)


def _time(sae_id: SaeId) -> str:
    return '"all"' if sae_id.t == "all" else str(float(sae_id.t))


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in names}
