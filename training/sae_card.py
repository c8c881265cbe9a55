"""The card and the manifest of a collection of SAEs: what they are, how good, and how to load them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.concept_files import weights_sha256
from core.sae import SaeId
from core.sae_files import CONFIG
from core.sae_source import INDEX, list_saes
from training.report import Table

CARD, MANIFEST = "README.md", "manifest.jsonl"


def write_sae_card(root: Path, source: str, tables: Sequence[Table]) -> None:
    """Write both into the collection's folder.

    source: what `core.load_sae` calls the collection.
    tables: those of `training.evaluate.sae`; the figures of the first go into the manifest too.
    """
    figures: Mapping[str, Mapping[str, Any]] = tables[0].details["figures"]
    ids, index = list_saes(root), json.loads((root / INDEX).read_text())
    lines = []
    for sae_id in ids:
        folder, config = root / sae_id.path, json.loads((root / sae_id.path / CONFIG).read_text())
        line = {
            "path": sae_id.path,
            **{key: config[key] for key in ("architecture", "d_in", "d_sae", "k") if key in config},
            "sha256": weights_sha256(folder),
            "metrics": figures.get(sae_id.path),
            "n_samples": config["metadata"]["n_samples"],
            "seed": config["metadata"]["seed"],
        }
        lines.append(line)
    shown = lines[(len(lines) - 1) // 2]
    (root / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / CARD).write_text(_card(shown["path"], shown["d_in"], source, index["recipe"], tables))


def _card(path: str, d_in: int, source: str, recipe: Mapping[str, Any], tables: Sequence[Table]) -> str:
    example = SaeId.parse(path)
    training, stream = recipe["training"], recipe["stream"]
    n_samples = training["n_steps"] * training["n_accumulated"] * stream["batch_size"]
    sections = "\n".join(table.markdown().replace("## ", "### ", 1) for table in tables)
    return f"""---
license: apache-2.0
tags: [sparse-autoencoder, saelens, diffusion, interpretability]
---

# Sparse autoencoders of {recipe["model"]}

Each rebuilds, from a few active latents of many, what one cross-attention block of the denoiser adds to the picture at
one position (its residual update). A latent that keeps meaning the same thing can be looked up, mapped and edited.

```python
import core

sae = core.load_sae("{source}", hookpoint="{example.hookpoint}", branch="{example.branch}", t="{example.t}")
code = sae.encode(x)  # x [N, {d_in}] -> .indices, .values [N, k]
```

A folder an SAE, `<hookpoint>/<cond|uncond>/t<time|all>`, in the form of SAELens v6, whose own loader reads it too; fp16
weights of an SAE that computes in fp32. `tall` reads every step of the sampler, so that a latent's number means the
same at each. `{MANIFEST}` has a line an SAE: figures, checksum, seed.

## Training

{training["architecture"]} with AuxK, {training["expansion"]} times as many latents as channels, on {n_samples:,}
samples of each block, taken while the sampler drew prompts from `{recipe["prompts"]}`; nothing was stored between. All
settings are under `recipe` in `{INDEX}`.

## How good they are

{sections}"""
