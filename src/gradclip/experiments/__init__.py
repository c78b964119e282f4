"""The experiments: one module each, with ``Config``, ``Config.profile(name)`` and ``run(config, out)``."""

import pkgutil


def names() -> list[str]:
    """Names of the experiments as the command line takes them: module names with hyphens.

    >>> "language-model" in names()
    True
    """
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
