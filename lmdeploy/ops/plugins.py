"""Packages that bring kernels of their own: modules named by the entry point group ``lmdeploy.kernels``.

An installed package says ``[project.entry-points."lmdeploy.kernels"]`` with ``name = "module"`` in its pyproject.toml;
that module registers what it has when it is imported. This happens once per process, before the first choice, so that
the processes of a server know the kernels, too. Only what is installed in the environment is looked at, never a model.
"""

from __future__ import annotations

from importlib import metadata

from lmdeploy.errors import ConfigError
from lmdeploy.log import get_logger

GROUP = 'lmdeploy.kernels'
_state = {'loaded': False}


def load() -> None:
    """Import the modules, the first time.

    Raises:
        ConfigError: LMD-211, one of them cannot be imported.
    """
    if _state['loaded']:
        return
    _state['loaded'] = True  # before the imports, which may choose something themselves
    for point in metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # code of somebody else: whatever it raises is told with its origin
            origin = f' ({point.dist.name} {point.dist.version})' if point.dist is not None else ''
            raise ConfigError('LMD-211', module=point.value, origin=origin,
                              reason=f'{type(error).__name__}: {error}') from error  # fmt: skip
        get_logger().info('kernels of %s are registered', point.value)
