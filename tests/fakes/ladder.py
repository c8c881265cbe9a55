"""Models of known mutual information in D dimensions: closed-form denoisers, and one network trained for all.

An image is x = sqrt(1 - t) y + sqrt(t) n, with y the value of the word and n noise, so that I(x; y) is D/2
log2(1/t) bits and x by itself is standard normal.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from core.diffusion.predictor import Conditions
from tests.fakes.gaussian import GaussianWorld

D = 8
RUNGS = (1.0, 2.0, 5.0, 10.0, 15.0)
"""Bits."""
LOW, HIGH = -5.0, 7.0
"""The range of log-SNR that is trained on and integrated."""


def noise_share(bits: float) -> float:
    """t, the share of an image's variance that does not depend on the word."""
    return float(2 ** (-2 * bits / D))


class Rung(GaussianWorld):
    """The model of one amount of information, with its optimal denoiser."""

    def __init__(self, bits: float):
        super().__init__(["word"], shape=(D, 1, 1), k=D)
        t = noise_share(bits)
        self.loadings, self.tau = math.sqrt(1 - t) * np.eye(D)[:, None], math.sqrt(t)


class TrainedRung(Rung):
    """The same with the denoiser that was trained for all amounts."""

    def __init__(self, bits: float, network: "Network"):
        super().__init__(bits)
        self._network, self._rung = network, RUNGS.index(bits)

    @torch.no_grad()
    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """The network's prediction."""
        has_word = conditions.tensors["words"][:, 0].float()
        y = torch.from_numpy(self.y[0]).float().expand(len(x), D)
        rung = torch.full((len(x),), self._rung)
        out: Tensor = self._network(x.flatten(1), log_snr.float(), y, has_word, rung)
        return out.reshape(x.shape)


class Network(nn.Module):
    """A small denoiser of a noisy image, its log-SNR, the value of the word or zeros, and the rung."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        n_in = D + D + 1 + len(RUNGS) + 9
        layers: list[nn.Module] = [nn.Linear(n_in, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, D))

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor, has_word: Tensor, rung: Tensor) -> Tensor:
        t = 2 * (log_snr[:, None] - LOW) / (HIGH - LOW) - 1
        waves = [f(k * math.pi / 2 * t) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]
        one_hot = torch.nn.functional.one_hot(rung, len(RUNGS)).float()
        out: Tensor = self.layers(torch.cat([x, y * has_word[:, None], has_word[:, None], one_hot, t, *waves], dim=1))
        return out


def train(n_steps: int = 2000, batch_size: int = 512, lr: float = 3e-3, seed: int = 0) -> Network:
    """Noise prediction as usual, the word withheld half of the time: seconds on one core."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, n_steps)
    shares = torch.tensor([noise_share(bits) for bits in RUNGS])
    for _ in range(n_steps):
        rung = torch.randint(len(RUNGS), (batch_size,), generator=generator)
        t, y, eps = shares[rung][:, None], normal(batch_size, D), normal(batch_size, D)
        x = (1 - t).sqrt() * y + t.sqrt() * normal(batch_size, D)
        log_snr = LOW + (HIGH - LOW) * torch.rand(batch_size, generator=generator)
        has_word = (torch.rand(batch_size, generator=generator) < 0.5).float()
        signal = torch.sigmoid(log_snr)[:, None]
        x_a = signal.sqrt() * x + (1 - signal).sqrt() * eps
        loss = (network(x_a, log_snr, y, has_word, rung) - eps).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def images(world: Rung, n: int, seed: int = 0) -> Iterator[Tensor]:
    """Images, each of a new value of the word."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        world.draw_words(rng)
        yield world.draw_image(rng)
