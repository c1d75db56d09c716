"""Arguments that several commands share: the model, the engine, one answer. Names are those of LMDeploy.

Values are checked where the Python API checks them, so that both say the same. An engine option reaches the config only
if it was given: the defaults are those of the public configs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmdeploy.errors import LmdeployError
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig

if TYPE_CHECKING:
    from lmdeploy.model import ChatTemplateConfig


class UsageError(LmdeployError):
    """The command line cannot be followed as it was typed."""


@dataclass(frozen=True, slots=True)
class EngineOption:
    """A flag and the field that it sets in each of the two public configs (None: that config has no such field)."""

    flag: str
    turbomind: str | None
    pytorch: str | None
    type: Any
    help: str

    @property
    def dest(self) -> str:
        return self.flag.removeprefix('--').replace('-', '_')


def share_or_blocks(text: str) -> int | float:
    """``'200'`` is a number of KV cache blocks, ``'0.5'`` a share of the free memory."""
    return int(text) if text.isdigit() else float(text)


ENGINE_OPTIONS = (
    EngineOption('--dtype', 'dtype', 'dtype', str, 'auto, float32, bfloat16 or float16'),
    EngineOption('--tp', 'tp', 'tp', int, 'number of devices that share the model'),
    EngineOption('--session-len', 'session_len', 'session_len', int, 'most tokens of a conversation'),
    EngineOption('--max-batch-size', 'max_batch_size', 'max_batch_size', int, 'most requests that run at once'),
    EngineOption('--cache-max-entry-count', 'cache_max_entry_count', 'cache_max_entry_count', share_or_blocks,
                 'KV cache: share of the free memory, such as 0.8, or a whole number of blocks'),
    EngineOption('--cache-block-seq-len', 'cache_block_seq_len', 'block_size', int, 'tokens of a KV cache block'),
    EngineOption('--max-prefill-token-num', 'max_prefill_token_num', 'max_prefill_token_num', int,
                 'most tokens of one step'),
    EngineOption('--enable-prefix-caching', 'enable_prefix_caching', 'enable_prefix_caching', bool,
                 'reuse the KV cache of prompts that begin alike'),
    EngineOption('--quant-policy', 'quant_policy', 'quant_policy', int, 'bits of the KV cache: 0 (as the model), 8, 4'),
    EngineOption('--lm-head-dtype', 'lm_head_dtype', 'lm_head_dtype', str, 'output head: auto, int8 or fp8'),
    EngineOption('--exact-weights', 'exact_weights', 'exact_weights', bool, 'dequantise GGUF weights when they load'),
    EngineOption('--model-format', 'model_format', 'model_format', str, 'storage of the weights (default: detected)'),
    EngineOption('--revision', 'revision', 'revision', str, 'branch, tag or commit on the hub'),
    EngineOption('--download-dir', 'download_dir', 'download_dir', str, 'folder for downloads'),
    EngineOption('--rope-scaling-factor', 'rope_scaling_factor', None, float, 'dynamic NTK factor, from 1; 0 is off'),
    EngineOption('--communicator', 'communicator', None, str, 'a hint; changes nothing on one device'),
    EngineOption('--device', None, 'device_type', str, 'cuda (the best device there is) or cpu'),
    EngineOption('--eager-mode', None, 'eager_mode', bool, 'run without graphs'),
    EngineOption('--adapters', None, 'adapters', list, 'LoRA adapters, as NAME=PATH'),
)


def add_engine_arguments(parser: argparse.ArgumentParser, options: Sequence[EngineOption] = ENGINE_OPTIONS, *,
                         template: bool = True) -> None:
    """The engine's flags, ``--backend`` and, if there are texts, ``--chat-template``."""
    group = parser.add_argument_group('engine')
    group.add_argument('--backend', choices=('turbomind', 'pytorch'), default=None,
                       help='under whose names the one engine is configured (default: as the other options need)')
    if template:
        group.add_argument('--chat-template', default=None, metavar='NAME',
                           help='a template name (see lmdeploy list --templates), a JSON file or JSON text')
    for option in options:
        kind: dict[str, Any] = {'type': option.type, 'metavar': option.type.__name__.upper()}
        if option.type is bool:
            kind = {'action': 'store_true'}
        elif option.type is list:
            kind = {'nargs': '+', 'metavar': 'NAME=PATH'}
        elif option.type is share_or_blocks:
            kind['metavar'] = 'NUMBER'
        group.add_argument(option.flag, dest=option.dest, default=argparse.SUPPRESS, help=option.help, **kind)


def engine_config(args: argparse.Namespace,
                  options: Sequence[EngineOption] = ENGINE_OPTIONS) -> TurbomindEngineConfig | PytorchEngineConfig:
    """The public config that the flags spell.

    Raises:
        UsageError: two flags that no single config has (LMD-406), or an adapter without a name (LMD-409).
    """
    given = [option for option in options if hasattr(args, option.dest)]
    only_turbomind = [option.flag for option in given if option.pytorch is None]
    only_pytorch = [option.flag for option in given if option.turbomind is None]
    if args.backend == 'turbomind':
        only_turbomind.append('--backend turbomind')
    elif args.backend == 'pytorch':
        only_pytorch.append('--backend pytorch')
    if only_turbomind and only_pytorch:
        raise UsageError('LMD-406', first=only_turbomind[0], second=only_pytorch[0])
    values = {option: getattr(args, option.dest) for option in given}
    if only_pytorch:
        pytorch: dict[str, Any] = {option.pytorch: _adapters(value) if option.type is list else value
                                   for option, value in values.items() if option.pytorch}
        return PytorchEngineConfig(**pytorch)
    turbomind: dict[str, Any] = {option.turbomind: value for option, value in values.items() if option.turbomind}
    return TurbomindEngineConfig(**turbomind)


def _adapters(pairs: list[str]) -> dict[str, str]:
    adapters = {}
    for pair in pairs:
        name, mark, path = pair.partition('=')
        if not (name and mark and path):
            raise UsageError('LMD-409', value=pair)
        adapters[name] = path
    return adapters


def template_config(args: argparse.Namespace) -> ChatTemplateConfig | None:
    """What ``--chat-template`` names; None: the model's own template."""
    if args.chat_template is None:
        return None
    from lmdeploy.model import ChatTemplateConfig

    return ChatTemplateConfig.from_option(args.chat_template)


def add_generation_arguments(parser: argparse.ArgumentParser, defaults: GenerationConfig) -> None:
    """The flags of one answer."""
    group = parser.add_argument_group('answer')
    group.add_argument('--system', default=None, metavar='TEXT', help='system prompt')
    group.add_argument('--max-new-tokens', type=int, default=defaults.max_new_tokens, metavar='N',
                       help='most tokens of an answer (default: %(default)s)')
    group.add_argument('--temperature', type=float, default=defaults.temperature, metavar='T',
                       help='0 always takes the most probable token (default: %(default)s)')
    group.add_argument('--top-p', type=float, default=defaults.top_p, metavar='P', help='default: %(default)s')
    group.add_argument('--top-k', type=int, default=defaults.top_k, metavar='K', help='0 is off (default: %(default)s)')
    group.add_argument('--repetition-penalty', type=float, default=defaults.repetition_penalty, metavar='R',
                       help='1 is off (default: %(default)s)')
    group.add_argument('--seed', type=int, default=None, metavar='N', help='same seed, same answer')


def generation_config(args: argparse.Namespace) -> GenerationConfig:
    """The GenerationConfig that the flags spell: sampling, unless the temperature is 0."""
    return GenerationConfig(do_sample=True, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                            top_p=args.top_p, top_k=args.top_k, repetition_penalty=args.repetition_penalty,
                            random_seed=args.seed)
