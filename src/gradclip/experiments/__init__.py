"""The experiments: one module each, with ``Config``, ``Config.profile(name)`` and ``run(config, out)``."""

import pkgutil


def names() -> list[str]:
    """Names of the experiments as the command line takes them: module names with hyphens.

    >>> "language-model" in names()
    True
    """
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))
