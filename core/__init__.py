"""Interpret a text-to-image diffusion model: which words, concepts and steps of the denoising made an image.

Importing this package imports no torch. The public names, listed in `__init__.pyi`, load their module on first use, so
that the app can serve its page, and a command line be parsed, before torch and diffusers are imported, which takes
seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
