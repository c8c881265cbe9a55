"""Model card, dataset card and manifest of a collection of SAEs."""

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
"""Files of an SAE in its folder."""
TABLE_FILES = (TABLE, COUNTS, EXAMPLES)
"""Files of its concept table in the same folder."""
LICENSE = "apache-2.0"
MEASURED = "## How good they are"
"""Heading of the last section of a collection's card, with the tables of the evaluation."""
Line = dict[str, Any]
"""A line of a manifest."""


def write_sae_card(root: Path, source: str, tables: Sequence[Table]) -> None:
    """Write card and manifest into the folder of a collection.

    Args:
        root: The folder.
        source: The name by which `core.load_sae` finds the collection.
        tables: The tables of `training.evaluate.sae.evaluation`; the figures of the first go into the manifest as well.
    """
    collection = find_collection(root)
    lines = manifest_lines(root, collection.ids, tables[0].details["figures"])
    write_text(root / MANIFEST, manifest_text(lines))
    sections = "\n".join(table.markdown().replace("## ", "### ", 1) for table in tables)
    write_text(root / CARD, sae_card(collection, source, lines, sections))


def manifest_lines(root: Path, ids: Sequence[SaeId], figures: Mapping[str, Any]) -> list[Line]:
    """One line per SAE with its figures and the hashes of its files, and last the gallery's, if there is one."""
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
    """Text of a manifest."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def labelled_share(table: Path) -> float | None:
    """Share of the latents that have a label; None without a table."""
    if not table.is_file():
        return None
    labels = pq.read_table(table, columns=["label"])["label"].to_pylist()
    return sum(bool(label) for label in labels) / len(labels)


def config_name(sae_id: SaeId) -> str:
    """Name of an SAE's table as a configuration of the dataset, where slashes are not allowed."""
    return sae_id.path.replace("/", "-")


def sae_card(collection: Collection, source: str, lines: Sequence[Line], measured: str, tables: str = "") -> str:
    """The model card of a collection.

    Args:
        collection: The collection.
        source: The name by which `core.load_sae` finds it.
        lines: Lines of the manifest.
        measured: Markdown with the tables of the evaluation.
        tables: The dataset on the Hub with the concept tables; empty if they are in the same folders.
    """
    recipe = collection.index["recipe"]
    name, training, stream = recipe["model"], recipe["training"], recipe["stream"]
    n_samples = training["n_steps"] * training["gradient_accumulation_steps"] * stream["batch_size"]
    spec = BUILT_IN.get(name) or ModelSpec(name=name, source=name)
    where = f"the dataset [{tables}](https://huggingface.co/datasets/{tables})" if tables else "the same folders"
    return f"""---
{_front(spec, tables)}---

# Sparse autoencoders of {name}

Each reconstructs the residual update of one cross-attention block of the denoiser, position by position, from a few
active latents out of many. Latents can be searched by label, mapped over an image, and edited.

```python
{_snippet(collection, spec, source, lines)}```

One folder per SAE, `<hookpoint>/<cond|uncond>/t<time|all>`, in the format of SAELens v6, whose own loader reads it as
well. Weights are stored in float16 and computed with in float32. `tall` is trained on every step of the sampler, so
that a latent has the same meaning at each. Labels of the latents and example images are in {where}.
`{MANIFEST}` has one line per SAE with figures, checksums and seed. `python app.py --saes {source}` opens the app with
them.

{_summary(lines)}
Explained variance (with its 95 % interval over images), L0 and the share of dead latents are measured on held-out
images. Labelled is the share of latents whose label matches the images better than chance.

## Training

{training["architecture"]} with AuxK, {training["expansion"]} times as many latents as channels, on {n_samples:,}
samples of each block, which were streamed while the sampler generated images of the prompts `{recipe["prompts"]}`. All
settings are under `recipe` in `{INDEX}`.

{MEASURED}

{measured}"""


def concepts_card(collection: Collection, source: str, tables: str, lines: Sequence[Line]) -> str:
    """The card of the dataset `tables` with the concepts of the SAEs that `core.load_sae` finds as `source`."""
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

# Concepts of the sparse autoencoders of {name}

One table per autoencoder of [{source}](https://huggingface.co/{source}), one row per latent: its label and kind; how
well it matches segmentation masks of that label (`iou` on the images on which the label was chosen, `held_out_iou` on
others, `chance_iou` and `p_value` with the masks of other images); and how often, how strongly, where and when it
fires. Latents without a label are included.

```python
from datasets import load_dataset

load_dataset("{tables}", "{config_name(shown)}", split="train")
```

With example images, and checked against the autoencoder:

```python
import core

table = core.load_concepts("{source}", hookpoint="{shown.hookpoint}", branch="{shown.branch}", t={_time(shown)})
table[0].gallery  # example images, each with its activation map
```

`{COUNTS}` next to a table has the co-occurrence of latents and classes; `{EXAMPLES}` lists the images of
`{FOLDER}/` that show a latent best, with its activation maps.
"""


def _front(spec: ModelSpec, tables: str) -> str:
    """Front matter of the model card."""
    base = "" if Path(spec.source).is_dir() else f"base_model: {spec.source}\n"
    data = f"datasets:\n- {tables}\n" if tables else ""
    tags = "tags: [sparse-autoencoder, saelens, diffusion, interpretability]\n"
    return f"license: {LICENSE}\nlibrary_name: saelens\n{tags}{base}{data}"


def _snippet(collection: Collection, spec: ModelSpec, source: str, lines: Sequence[Line]) -> str:
    """A Python example that runs where this project is installed."""
    shown = example_of(collection.ids)
    step = step_at(0.5 if shown.t == "all" else shown.t, spec.num_inference_steps)
    where = f'hookpoint="{shown.hookpoint}", branch="{shown.branch}", t={_time(shown)}'
    text = f"""import core
from core.activations.hooks import record

model = core.load_model("{spec.name}")
sae = core.load_sae("{source}", {where})
with record(model, ["{shown.hookpoint}"], steps=[{step}]) as updates:
    model.generate("a cat on the grass", seed=0)
x = updates["{shown.hookpoint}", "{shown.branch}", {step}][0].flatten(1).T  # [positions, channels]
code = sae.encode(x)  # .indices, .values [positions, k]
sae.decode(code)  # close to x
"""
    if not any(line.get("labelled_share") is not None for line in lines):
        return text
    return f"""{text}
table = core.load_concepts("{source}", {where})
table[int(code.indices[0, 0])].label  # label of the strongest latent at the first position
"""


def _summary(lines: Sequence[Line]) -> str:
    """Markdown table with one row per SAE."""
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
    """The SAE used as the example in the cards: the first at the bottleneck."""
    hookpoint = default_hookpoint([*dict.fromkeys(sae_id.hookpoint for sae_id in ids)])
    return next(sae_id for sae_id in ids if sae_id.hookpoint == hookpoint)


def _time(sae_id: SaeId) -> str:
    return '"all"' if sae_id.t == "all" else str(float(sae_id.t))


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in names}
