"""The experiments: one module each, with ``Config``, ``Config.profile(name)`` and ``run(config, out)``."""

import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Names of the experiments as the command line takes them: module names with hyphens.

    >>> "language-model" in names()
    True
    """
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def shared(module: ModuleType) -> str | None:
    """What several processes share of an experiment, or None if each would do all the work.

    Runs, where the module calls :func:`._shell.run_tasks`; something else if it says so in ``SHARED``.

    Args:
        module: Of the experiment.

    Returns:
        ``"runs"``, ``"batches"`` or None.
    """
    return getattr(module, "SHARED", "runs" if hasattr(module, "run_tasks") else None)
