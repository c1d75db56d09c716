"""Kernels of your own: what can be replaced, how, and what is chosen.

Three things are chosen at run time among candidates, each of which may give reasons against itself for a case (device,
data type, shape); the first without a reason is taken, and what was registered last is asked first:

* an **op** (:func:`get_op`), a function of tensors with a reference in torch: ``@get_op('rms_norm').impl('cpu')``;
* an **attention backend** (:func:`register_attention`), which rotates, writes the cache and attends;
* a **linear kernel** (:func:`register_linear`, :func:`register_gated`), which packs a weight once and multiplies.

:func:`explain` prints the candidates and what became of each. Register before a pipeline starts: it chooses when it
loads its weights. A server's engine is a process of its own, which knows kernels of installed packages only: see
:mod:`lmdeploy.ops.plugins` for how a package names its module.
"""

from __future__ import annotations

import torch

from lmdeploy.attention.backend import AttentionBackend, AttentionCase, Rotation
from lmdeploy.attention.backend import explain as explain_attention
from lmdeploy.attention.backend import register as register_attention
from lmdeploy.errors import ConfigError
from lmdeploy.ops.table import Implementation, Op, OpCase, op, registered
from lmdeploy.quant.kernels import GatedKernel, KernelCase, LinearKernel, register_gated, register_linear
from lmdeploy.quant.kernels import explain as explain_kernels
from lmdeploy.quant.scheme import dense_scheme
from lmdeploy.runner.model_runner import choose_device, choose_dtype  # and with it every op

__all__ = ['AttentionBackend', 'AttentionCase', 'GatedKernel', 'Implementation', 'KernelCase', 'LinearKernel', 'Op',
           'OpCase', 'Rotation', 'explain', 'get_op', 'op', 'op_names', 'register_attention', 'register_gated',
           'register_linear']

TYPICAL = AttentionCase(heads=32, kv_heads=8, head_dim=128)


def op_names() -> list[str]:
    """The ops that there are."""
    return sorted(registered('cpu'))


def get_op(name: str) -> Op:
    """An op by its name. Its docstring is the contract, ``.reference`` the torch function, ``.impl`` the decorator.

    Raises:
        ConfigError: LMD-212, there is none of that name.
    """
    ops = registered('cpu')
    if name not in ops:
        raise ConfigError('LMD-212', name=name, known=', '.join(sorted(ops)))
    return ops[name]


def explain(device: str = 'auto', dtype: str = 'auto', attention: AttentionCase = TYPICAL) -> str:
    """What runs on a device, and why: a line per candidate, ``what: candidate: chosen | ready | reasons against it``.

    Args:
        device: ``'auto'``, ``'cpu'`` or ``'cuda'``. dtype: as in an engine config.
        attention: the heads of the model; there is one backend for all of its layers.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where, '')
    lines = [each.explain(OpCase(where.type, kind)) for _, each in sorted(registered(where.type).items())]
    lines.append(explain_attention(where, kind, attention))
    lines.append(explain_kernels(KernelCase(dense_scheme(8 * kind.itemsize), kind, torch.device(where))))
    return '\n'.join(lines)
