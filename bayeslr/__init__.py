"""Bayesian hyperparameter prediction: the learning rate of a large run, from cheap proxies.

The public door. Nothing heavy is loaded until a name is used (PEP 562).
"""

import lazy_loader as lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
