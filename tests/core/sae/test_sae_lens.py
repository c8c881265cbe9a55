"""Our SAEs in SAELens itself, in an environment of its own that the test makes once."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.folders import cache_folder
from core.sae.autoencoder import Architecture, SaeConfig, SparseAutoencoder
from core.sae.io import read_sae, save_sae
from training.benchmark.saes import environment

THEIRS = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE

folder, x, out = sys.argv[1:]
sae = SAE.load_from_disk(folder, device="cpu")
code = sae.encode(load_file(x)["x"])
save_file({"code": code.detach().to_dense().contiguous(), "rebuilt": sae.decode(code).detach().contiguous()}, out)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_sae_lens_reads_ours_to_the_same_codes(tmp_path: Path, architecture: Architecture, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(48, 192, 5, architecture), generator=generator).requires_grad_(False)
    sae.b_dec.normal_(generator=generator)
    sae.encoder.bias.normal_(0, 0.1, generator=generator)
    if sae.threshold is not None:
        sae.threshold.fill_(1.5)
    save_sae(sae, tmp_path / "sae", {"model": "picturebook"}, dtype)
    x = 3 * torch.randn(64, 48, generator=generator)
    save_file({"x": x}, tmp_path / "x.safetensors")
    python = environment("sae_lens", cache_folder("benchmark") / "peers")
    files = [str(tmp_path / name) for name in ("sae", "x.safetensors", "out.safetensors")]
    subprocess.run([str(python), "-c", THEIRS, *files], check=True, cwd=tmp_path)
    theirs = load_file(files[-1])
    ours = read_sae(tmp_path / "sae")
    code = ours.encode(x)
    dense = torch.zeros(64, 193).scatter_(1, code.indices.where(code.indices >= 0, 192), code.values)[:, :192]
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["d_sae"] == 192
    assert ((dense > 0) == (theirs["code"] > 0)).all()
    torch.testing.assert_close(dense, theirs["code"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(code), theirs["rebuilt"], atol=1e-5, rtol=1e-5)
