"""How threads wait for each other. Imports nothing heavy: it has to be set before torch is imported."""

import os


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says otherwise.

    By default they spin. On processors that others use too, such as a laptop's or a small server's, a thread then burns
    the time that the one it waits for would need.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
