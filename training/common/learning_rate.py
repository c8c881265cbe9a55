"""The learning-rate schedule of all training here: linear warm-up, a constant rate, linear decay to zero (WSD)."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_stable_decay(
    optimizer: Optimizer, n_steps: int, n_warmup: int, decay_fraction: float, *, step: int = 0
) -> LambdaLR:
    """A scheduler whose `step()` is called after each optimiser step.

    The peak rate is that of the optimiser's groups. Step s of n has 1 / n_warmup of it times s + 1 at first, and in the
    last `decay_fraction` of the steps (n - s) / (decay_fraction * n), so that no step is taken at a rate of zero.
    `transformers.get_wsd_schedule` begins at zero instead.

    Args:
        optimizer: Its groups' rates are set, at once and by each `step()`.
        n_steps: Steps of the whole run.
        n_warmup: Steps of warm-up; 0 for none.
        decay_fraction: Fraction of the steps over which the rate falls; 0 for none.
        step: Steps already done, of a resumed run.
    """

    def factor(step: int) -> float:
        warm = (step + 1) / max(n_warmup, 1)
        left = (n_steps - step) / max(decay_fraction * n_steps, 1)
        return min(warm, left, 1.0)

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # which LambdaLR wants of a resumed run
    return LambdaLR(optimizer, factor, last_epoch=step - 1)
