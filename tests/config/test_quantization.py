"""quantization_config: which layers are stored how, and what is refused by field and value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.config.options import normalise
from lmdeploy.config.quantization import Storage, check_model_format, read_quantization
from lmdeploy.errors import ConfigError
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig

E4M3 = 'float8_e4m3fn'
LAYER = 'model.layers.11.self_attn.q_proj'
AWQ = {'quant_method': 'awq', 'version': 'gemm', 'bits': 4, 'group_size': 128, 'zero_point': True,
       'modules_to_not_convert': ['lm_head', 'layers.1', 'visual']}
GPTQ = {'quant_method': 'gptq', 'bits': 4, 'group_size': 128, 'sym': True, 'desc_act': False, 'damp_percent': 0.01,
        'lm_head': False, 'checkpoint_format': 'gptq', 'model_name_or_path': None}
FP8 = {'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic', 'weight_block_size': [128, 128],
       'modules_to_not_convert': ['lm_head']}
SMOOTH = {'quant_method': 'smooth_quant', 'quant_dtype': 'int8'}
TOKENS = {'num_bits': 8, 'type': 'int', 'symmetric': True, 'strategy': 'token', 'dynamic': True}
PACKED = {
    'quant_method': 'compressed-tensors', 'format': 'pack-quantized', 'quantization_status': 'compressed',
    'ignore': ['lm_head', 're:.*mlp.gate$'], 'kv_cache_scheme': None,
    'config_groups': {'group_0': {
        'format': 'pack-quantized', 'targets': ['Linear'],
        'weights': {'num_bits': 4, 'type': 'int', 'symmetric': True, 'strategy': 'group', 'group_size': 128,
                    'dynamic': False, 'actorder': None, 'observer': 'minmax'},
        'input_activations': None, 'output_activations': None}},
    'transform_config': {'config_groups': {}}, 'sparsity_config': {},
}
GROUP = 'config_groups.group_0'
TRANSFORMS = 'transform_config.config_groups'


def spread(**changes: Any) -> dict:
    """The groups of a transform_config: a block Hadamard on the inputs of two kinds of layers."""
    targets = {'targets': ['re:.*(q|down)_proj$'], 'ignore': ['layers.3']}
    entry = {key: changes.pop(key) for key in ('targets', 'location', 'ignore') if key in changes}
    apply = [targets | {'location': 'weight_input', 'inverse': True}, targets | {'location': 'input'} | entry]
    return {'spread': {'type': 'hadamard', 'apply': apply, 'randomize': False, 'head_dim': 64,
                       'precision': 'torch.float32'} | changes}  # fmt: skip


def changed(config: dict, changes: dict[str, Any]) -> dict:
    """``config`` with the fields at dotted paths set."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split('.')
        at = config
        for parent in parents:
            at = at[parent]
        at[last] = value
    return config


def storage(config: dict, name: str = LAYER, **changes: Any) -> Storage | None:
    return read_quantization({'quantization_config': changed(config, changes)}).storage(name)


def test_what_each_method_means():
    assert storage(AWQ) == Storage('awq', bits=4, group=128, symmetric=False)
    assert storage(AWQ, zero_point=False, group_size=-1) == Storage('awq', bits=4, group=0)
    assert storage(GPTQ) == Storage('gptq', bits=4, group=128, zero_shift=1)
    assert storage(GPTQ, checkpoint_format='gptq_v2', bits=3, sym=False) == Storage('gptq', bits=3, group=128,
                                                                                    symmetric=False)
    assert storage(FP8) == Storage('fp8', E4M3, 8, 128, 128, activation=E4M3, activation_group=128)
    assert storage(FP8, weight_block_size=None) == Storage('fp8', E4M3, rows=0, activation=E4M3)
    assert storage(FP8, weight_block_size=None, activation_scheme='static').static
    assert storage(SMOOTH) == Storage('smooth_quant', activation='int8')
    assert storage(SMOOTH, quant_dtype=E4M3) == Storage('smooth_quant', E4M3, activation=E4M3)


def test_inputs_are_transformed_where_it_is_said():
    found = read_quantization({'quantization_config': changed(PACKED, {TRANSFORMS: spread()})})
    assert found is not None and found.storage(LAYER) == Storage('pack-quantized', bits=4, group=128,
                                                                 transform='hadamard:64')
    assert found.transform('model.layers.11.mlp.down_proj') == 'hadamard:64'
    assert not found.transform('model.layers.3.mlp.down_proj') and not found.transform('model.layers.11.mlp.up_proj')
    assert found.storage('model.layers.3.self_attn.q_proj') == storage(PACKED)


def test_what_compressed_tensors_means():
    assert storage(PACKED) == Storage('pack-quantized', bits=4, group=128)
    w4a8 = {f'{GROUP}.input_activations': TOKENS}
    assert storage(PACKED, **w4a8) == Storage('pack-quantized', bits=4, group=128, activation='int8')
    weights = {'num_bits': 8, 'type': 'int', 'strategy': 'channel'}
    w8a8 = w4a8 | {f'{GROUP}.format': 'int-quantized', f'{GROUP}.weights': weights}
    assert storage(PACKED, **w8a8) == Storage('int-quantized', activation='int8')
    floats = {'num_bits': 8, 'type': 'float', 'strategy': 'block', 'block_structure': [64, 32]}
    inputs = TOKENS | {'type': 'float', 'strategy': 'group', 'group_size': 32}
    blocks = {f'{GROUP}.format': 'float-quantized', f'{GROUP}.weights': floats, f'{GROUP}.input_activations': inputs}
    assert storage(PACKED, **blocks) == Storage('float-quantized', E4M3, 8, 32, 64, activation=E4M3,
                                                activation_group=32)
    one = {'num_bits': 8, 'type': 'float', 'strategy': 'tensor'}
    static = {f'{GROUP}.format': 'naive-quantized', f'{GROUP}.weights': one,
              f'{GROUP}.input_activations': one | {'dynamic': False}}
    assert storage(PACKED, **static) == Storage('float-quantized', E4M3, rows=0, activation=E4M3, static=True)


@pytest.mark.parametrize(('config', 'name', 'quantised'), [
    (AWQ, 'lm_head', False),
    (AWQ, 'model.layers.1.mlp.up_proj', False),
    (AWQ, 'model.layers.10.mlp.up_proj', True),  # whole components, not their beginnings
    (AWQ, 'model.visual.blocks.0.proj', False),
    (PACKED, 'lm_head', False),
    (PACKED, 'model.layers.0.mlp.gate', False),
    (PACKED, 'model.layers.0.mlp.gate_proj', True),
    (FP8, 'lm_head', False),
    (FP8 | {'ignored_layers': ['model.layers.11.self_attn.q_proj']}, LAYER, False),
])  # fmt: skip
def test_what_is_left_alone(config: dict, name: str, quantised: bool):
    assert (storage(config, name) is not None) is quantised


def test_layers_of_their_own():
    own = {'-:.*down_proj': {}, '+:.*layers\\.1[0-9]\\.': {'bits': 8, 'group_size': 64}}
    assert storage(GPTQ, 'model.layers.0.mlp.down_proj', dynamic=own) is None
    assert storage(GPTQ, dynamic=own) == Storage('gptq', bits=8, group=64, zero_shift=1)
    assert storage(GPTQ, 'model.layers.0.mlp.up_proj', dynamic=own).bits == 4
    groups = copy.deepcopy(PACKED['config_groups'])
    groups['group_1'] = copy.deepcopy(groups['group_0']) | {'targets': ['re:.*q_proj$']}
    groups['group_1']['weights']['num_bits'] = 8
    assert storage(PACKED, config_groups=groups).bits == 8  # a name goes before the class of all
    assert storage(PACKED, 'model.layers.0.self_attn.k_proj', config_groups=groups).bits == 4


def test_where_it_lies():
    assert read_quantization({}) is None and read_quantization({'quantization_config': None}) is None
    assert read_quantization({'llm_config': {'quantization_config': AWQ}}).method == 'awq'
    assert read_quantization({'compression_config': PACKED}).method == 'compressed-tensors'


W = f'{GROUP}.weights'
A = f'{GROUP}.input_activations'


@pytest.mark.parametrize(('config', 'changes', 'code', 'text'), [
    (AWQ, {'quant_method': 'exl3'}, 'LMD-116', "'exl3'"),
    (AWQ, {'quant_method': 7}, 'LMD-113', 'quant_method'),
    (AWQ, {'version': 'gemv_fast'}, 'LMD-115', "version = 'gemv_fast', which this version does not support. It"),
    (AWQ, {'bits': 8}, 'LMD-115', 'bits = 8'),
    (AWQ, {'bits': None}, 'LMD-112', 'w_bit'),
    (AWQ, {'group_size': 0}, 'LMD-113', 'group_size = 0'),
    (AWQ, {'group_size': -2}, 'LMD-113', 'group_size = -2'),
    (AWQ, {'zero_point': 'yes'}, 'LMD-113', 'zero_point'),
    (AWQ, {'modules_to_not_convert': 'lm_head'}, 'LMD-113', 'modules_to_not_convert'),
    (GPTQ, {'bits': 5}, 'LMD-115', 'bits = 5'),
    (GPTQ, {'checkpoint_format': 'marlin'}, 'LMD-115', "'marlin'"),
    (GPTQ, {'pack_dtype': 'int8'}, 'LMD-115', 'pack_dtype'),
    (GPTQ, {'dynamic': {'(': {}}}, 'LMD-113', 'dynamic'),
    (GPTQ, {'dynamic': {'.*': 4}}, 'LMD-113', 'dynamic'),
    (GPTQ, {'dynamic': {'.*': {'bits': 6}}}, 'LMD-115', 'bits = 6'),
    (FP8, {'fmt': 'e5m2'}, 'LMD-115', 'fmt'),
    (FP8, {'activation_scheme': 'static'}, 'LMD-114', 'weight_block_size'),
    (FP8, {'activation_scheme': 'none'}, 'LMD-115', 'activation_scheme'),
    (FP8, {'weight_block_size': [128]}, 'LMD-113', 'weight_block_size'),
    (FP8, {'weight_block_size': [128, 0]}, 'LMD-113', 'weight_block_size'),
    (FP8, {'scale_fmt': 'ue8m0'}, 'LMD-115', 'scale_fmt'),
    (SMOOTH, {'quant_dtype': 'int4'}, 'LMD-115', 'quant_dtype'),
    (PACKED, {f'{GROUP}.format': 'nvfp4-pack-quantized'}, 'LMD-115', 'nvfp4'),
    (PACKED, {f'{W}.num_bits': 9}, 'LMD-115', 'num_bits = 9'),
    (PACKED, {f'{W}.num_bits': 1}, 'LMD-115', 'num_bits = 1'),
    (PACKED, {f'{W}.type': 'float'}, 'LMD-115', 'format'),
    (PACKED, {f'{GROUP}.format': 'float-quantized'}, 'LMD-114', 'integers'),
    (PACKED, {f'{W}.strategy': 'block'}, 'LMD-115', 'strategy'),
    (PACKED, {f'{W}.strategy': 'tensor', f'{W}.symmetric': False}, 'LMD-115', "'tensor' with zero points"),
    (PACKED, {f'{W}.group_size': None}, 'LMD-112', f'{W}.group_size'),
    (PACKED, {f'{W}.dynamic': True}, 'LMD-115', 'dynamic'),
    (PACKED, {W: None}, 'LMD-112', W),
    (PACKED, {f'{GROUP}.targets': []}, 'LMD-113', 'targets'),
    (PACKED, {f'{GROUP}.targets': ['re:(a+)+$']}, 'LMD-113', 'repeated groups'),
    (PACKED, {'ignore': ['re:[']}, 'LMD-113', 'ignore'),
    (PACKED, {'ignore': ['x' * 2000]}, 'LMD-113', 'ignore'),
    (PACKED, {A: TOKENS | {'num_bits': 4}}, 'LMD-115', 'num_bits = 4'),
    (PACKED, {A: TOKENS | {'symmetric': False}}, 'LMD-115', 'symmetric'),
    (PACKED, {A: TOKENS | {'strategy': 'channel'}}, 'LMD-115', 'strategy'),
    (PACKED, {A: TOKENS | {'dynamic': False}}, 'LMD-115', 'strategy'),
    (PACKED, {f'{GROUP}.output_activations': TOKENS}, 'LMD-115', 'output_activations'),
    (PACKED, {'config_groups': {}}, 'LMD-112', 'config_groups'),
    (PACKED, {'config_groups': {'group_0': 3}}, 'LMD-113', 'group_0'),
    (PACKED, {'quantization_status': 'frozen'}, 'LMD-115', 'frozen'),
    (PACKED, {TRANSFORMS: {'u': {'type': 'hadamard'}}}, 'LMD-112', 'transform_config.config_groups.u.apply'),
    (PACKED, {TRANSFORMS: {'u': {'type': 'hadamard', 'apply': [3]}}}, 'LMD-113', 'apply'),
    (PACKED, {TRANSFORMS: spread(type='random-hadamard')}, 'LMD-115', 'random-hadamard'),
    (PACKED, {TRANSFORMS: spread(randomize=True)}, 'LMD-115', 'randomize'),
    (PACKED, {TRANSFORMS: spread(head_dim=None)}, 'LMD-115', 'head_dim'),
    (PACKED, {TRANSFORMS: spread(head_dim=96)}, 'LMD-115', 'head_dim = 96'),
    (PACKED, {TRANSFORMS: spread(location='output')}, 'LMD-115', 'location'),
    (PACKED, {TRANSFORMS: spread(targets=['re:(a+)+$'])}, 'LMD-113', 'repeated groups'),
    (PACKED, {TRANSFORMS: spread(targets=7)}, 'LMD-113', 'targets'),
    (PACKED, {'sparsity_config.format': 'sparse-24'}, 'LMD-115', 'sparsity_config'),
])  # fmt: skip
def test_what_is_refused_by_name(config: dict, changes: dict, code: str, text: str):
    with pytest.raises(ConfigError) as caught:
        storage(config, **changes)
    assert caught.value.code == code and text in str(caught.value)
    assert caught.value.text('zh') != caught.value.text('en')


def paths(config: dict, at: str = '') -> list[str]:
    """The dotted paths of all fields, nested ones too."""
    found = []
    for name, value in config.items():
        found.append(at + name)
        found += paths(value, f'{at}{name}.') if isinstance(value, dict) else []
    return found


JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=12),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=5)  # fmt: skip


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_whatever_a_field_holds_it_is_read_or_refused(data: st.DataObject):
    config = data.draw(st.sampled_from([AWQ, GPTQ, FP8, SMOOTH, PACKED]))
    extra = ['dynamic', 'ignored_layers', 'scale_fmt', 'pack_dtype', 'w_bit', 'format']
    changes = {data.draw(st.sampled_from(paths(config) + extra)): data.draw(JSON)}
    try:
        found = storage(config, **changes)
    except ConfigError as error:
        assert error.text('zh') and error.code in ('LMD-112', 'LMD-113', 'LMD-114', 'LMD-115', 'LMD-116')
        return
    assert found is None or 2 <= found.bits <= 8


@pytest.mark.parametrize('public', [TurbomindEngineConfig, PytorchEngineConfig])
def test_model_format_is_a_claim_that_is_checked(public: type):
    for value in ('awq', 'gptq', 'compressed-tensors', 'fp8', 'smooth_quant', 'hf', None):
        assert normalise(public(model_format=value)).model_format == value
    with pytest.raises(ConfigError, match="LMD-221.*model_format='exl2'"):
        normalise(public(model_format='exl2'))
    quantised, dense = {'quantization_config': AWQ}, {}
    for value, config in ((None, quantised), ('awq', quantised), (None, dense), ('hf', dense)):
        check_model_format(value, config)
    for value, config, found in (('gptq', quantised, 'awq'), ('hf', quantised, 'awq'), ('awq', dense, 'hf')):
        with pytest.raises(ConfigError) as caught:
            check_model_format(value, config)
        assert caught.value.code == 'LMD-229' and caught.value.params == {'value': value, 'found': found}
