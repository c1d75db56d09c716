"""A vision model's config files: what published ones mean, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmdeploy.bench import shapes
from lmdeploy.config.model import ModelConfig
from lmdeploy.config.vision import is_vision_model, read_vision, vision_model
from lmdeploy.errors import ConfigError

INTERN: dict[str, Any] = json.loads((shapes.FOLDER / 'internvl3-1b.json').read_text())
INTERN_HF = {
    'architectures': ['InternVLForConditionalGeneration'], 'image_token_id': 151667, 'downsample_ratio': 0.5,
    'text_config': {'model_type': 'qwen2', 'architectures': ['Qwen2ForCausalLM'], 'hidden_size': 896,
                    'intermediate_size': 4864, 'num_hidden_layers': 24, 'num_attention_heads': 14,
                    'num_key_value_heads': 2, 'vocab_size': 151674, 'rope_theta': 1e6},
    'vision_config': {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'attention_bias': True,
                      'intermediate_size': 4096, 'image_size': [448, 448], 'patch_size': [14, 14], 'hidden_act': 'gelu',
                      'norm_type': 'layer_norm', 'layer_norm_eps': 1e-6, 'use_qk_norm': False},
}  # fmt: skip
LLAVA = {
    'architectures': ['LlavaForConditionalGeneration'], 'image_token_index': 32000, 'pad_token_id': 32001,
    'projector_hidden_act': 'gelu', 'vision_feature_layer': -2, 'vision_feature_select_strategy': 'default',
    'text_config': {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'max_position_embeddings': 4096,
                    'rms_norm_eps': 1e-5, 'vocab_size': 32064},
    'vision_config': {'hidden_size': 1024, 'image_size': 336, 'intermediate_size': 4096, 'patch_size': 14,
                      'model_type': 'clip_vision_model', 'num_attention_heads': 16, 'num_hidden_layers': 24},
}  # fmt: skip
NEXT = {**LLAVA, 'architectures': ['LlavaNextForConditionalGeneration'],
        'image_grid_pinpoints': [[336, 672], [672, 672]],
        'text_config': {'model_type': 'mistral', 'intermediate_size': 14336, 'num_key_value_heads': 8,
                        'max_position_embeddings': 32768, 'rope_theta': 1e6, 'sliding_window': None}}  # fmt: skip
QWEN = {
    'architectures': ['Qwen2_5_VLForConditionalGeneration'], 'hidden_size': 2048, 'intermediate_size': 11008,
    'num_hidden_layers': 36, 'num_attention_heads': 16, 'num_key_value_heads': 2, 'vocab_size': 151936,
    'max_position_embeddings': 128000, 'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'tie_word_embeddings': True,
    'image_token_id': 151655, 'use_sliding_window': False, 'sliding_window': 32768, 'max_window_layers': 70,
    'rope_scaling': {'type': 'mrope', 'mrope_section': [16, 24, 24]},
    'vision_config': {'depth': 32, 'hidden_act': 'silu', 'hidden_size': 1280, 'intermediate_size': 3420,
                      'num_heads': 16, 'out_hidden_size': 2048, 'patch_size': 14, 'spatial_merge_size': 2,
                      'window_size': 112, 'fullatt_block_indexes': [7, 15, 23, 31], 'temporal_patch_size': 2},
}  # fmt: skip


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy; ``vision_config__patch_size=8`` changes a nested field, and None takes one away."""
    config = json.loads(json.dumps(config))
    for name, value in changes.items():
        *parents, last = name.split('__')
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]
    return config


def test_internvl():
    vision = read_vision(INTERN)
    assert (vision.tokens_per_tile, vision.patches_per_tile, vision.hidden_size) == (256, 1025, 896)
    assert (vision.picture.max_tiles, vision.picture.thumbnail, vision.shuffle) == (12, True, 'v2')
    assert (vision.before, vision.image_token, vision.after) == ('<img>', '<IMG_CONTEXT>', '</img>')
    language = ModelConfig.from_dict(INTERN)
    assert (language.architecture, language.wrapper) == ('Qwen2ForCausalLM', 'InternVLChatModel')
    assert (language.head_dim, language.vocab_size, language.rope.rope_type) == (64, 151674, 'dynamic')


def test_internvl_6b_is_the_default_of_the_original_code():
    config = changed(INTERN, vision_config={'hidden_size': 3200, 'num_hidden_layers': 45, 'num_attention_heads': 25,
                                            'intermediate_size': 12800, 'image_size': 448, 'patch_size': 14})
    tower = read_vision(config).tower
    assert (tower.rms_norm, tower.qk_norm, tower.qkv_bias) == (True, True, False)


def test_internvl_without_tiles():
    picture = read_vision(changed(INTERN, dynamic_image_size=False)).picture
    assert (picture.min_tiles, picture.max_tiles) == (1, 1)


def test_internvl_of_transformers():
    vision = read_vision(INTERN_HF, {'max_patches': 6, 'image_mean': [0.1, 0.2, 0.3]})
    assert (vision.image_token_id, vision.picture.max_tiles, vision.picture.mean) == (151667, 6, (0.1, 0.2, 0.3))
    assert vision.tower == read_vision(INTERN).tower


def test_llava_whose_text_config_leaves_out_what_is_usual():
    vision, language = read_vision(LLAVA), ModelConfig.from_dict(LLAVA)
    assert (vision.tokens_per_tile, vision.hidden_size, vision.feature_layer, vision.image_token_id) == (
        576, 4096, -2, 32000)  # fmt: skip
    assert (language.num_layers, language.num_heads, language.intermediate_size) == (32, 32, 11008)
    full = read_vision(changed(LLAVA, vision_feature_select_strategy='full', vision_feature_layer=23))
    assert (full.tokens_per_tile, full.feature_layer) == (577, -2)


def test_llava_next_over_mistral():
    language = ModelConfig.from_dict(NEXT)
    assert (language.architecture, language.num_kv_heads, language.sliding_window) == ('MistralForCausalLM', 8, 0)
    assert read_vision(NEXT).picture.pinpoints == ((336, 672), (672, 672))


def test_qwen():
    vision, language = read_vision(QWEN, {'min_pixels': 3136, 'max_pixels': 12845056}), ModelConfig.from_dict(QWEN)
    assert (vision.mrope, vision.tower.window, vision.tower.full_layers) == (True, 112, (7, 15, 23, 31))
    assert (vision.picture.min_pixels, vision.picture.max_pixels) == (3136, 12845056)
    assert (language.rope.rope_type, language.rope.sections, language.tie_word_embeddings) == (
        'default', (16, 24, 24), True)  # fmt: skip


def test_folders(tmp_path):
    assert vision_model(tmp_path) is None and not is_vision_model({'architectures': ['LlamaForCausalLM']})
    (tmp_path / 'config.json').write_text(json.dumps(QWEN))
    (tmp_path / 'processor_config.json').write_text(json.dumps({'image_processor': {'max_pixels': 28 * 28 * 9}}))
    assert vision_model(tmp_path).picture.max_pixels == 28 * 28 * 9
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps({'max_pixels': 28 * 28 * 8}))
    assert vision_model(tmp_path).picture.max_pixels == 28 * 28 * 8


@pytest.mark.parametrize(('config', 'preprocessor', 'code', 'names'), [
    ({'architectures': ['CogVLMForCausalLM']}, {}, 'LMD-110', 'CogVLM'),
    (changed(INTERN, vision_config=None), {}, 'LMD-112', 'vision_config'),
    (changed(INTERN, llm_config=None), {}, 'LMD-112', 'llm_config'),
    (changed(INTERN, llm_config__architectures=['Phi3ForCausalLM']), {}, 'LMD-110', 'Phi3ForCausalLM'),
    (changed(INTERN, vision_config__num_hidden_layers=0), {}, 'LMD-113', 'num_hidden_layers'),
    (changed(INTERN, vision_config__norm_type='batch_norm'), {}, 'LMD-115', 'batch_norm'),
    (changed(INTERN, vision_config__num_attention_heads=7), {}, 'LMD-114', '1024'),
    (changed(INTERN, vision_config__hidden_act='tanh'), {}, 'LMD-115', 'tanh'),
    (changed(INTERN, force_image_size=224), {}, 'LMD-115', 'force_image_size'),
    (changed(INTERN, downsample_ratio=0.3), {}, 'LMD-113', 'downsample_ratio'),
    (changed(INTERN, ps_version='v3'), {}, 'LMD-115', 'v3'),
    (changed(INTERN, pad2square=True), {}, 'LMD-115', 'pad2square'),
    (changed(INTERN, max_dynamic_patch=1000), {}, 'LMD-113', 'max_dynamic_patch'),
    (changed(INTERN, select_layer=-30), {}, 'LMD-114', '-30'),
    (changed(INTERN_HF, vision_config__image_size=[448, 224]), {}, 'LMD-113', 'image_size'),
    (changed(INTERN_HF, vision_config__use_mean_pooling=False), {}, 'LMD-115', 'use_mean_pooling'),
    (INTERN_HF, {'do_normalize': False}, 'LMD-115', 'do_normalize'),
    (INTERN_HF, {'size': {'height': 224, 'width': 224}}, 'LMD-114', '224'),
    (INTERN_HF, {'rescale_factor': 0.5}, 'LMD-113', 'rescale_factor'),
    (changed(LLAVA, vision_config__model_type='dinov2'), {}, 'LMD-115', 'dinov2'),
    (changed(LLAVA, vision_feature_layer=[-2, -5]), {}, 'LMD-113', 'vision_feature_layer'),
    (changed(LLAVA, vision_feature_select_strategy='some'), {}, 'LMD-115', 'some'),
    (LLAVA, {'do_pad': True}, 'LMD-115', 'do_pad'),
    (LLAVA, {'crop_size': 224}, 'LMD-114', '224'),
    (LLAVA, {'size': 'large'}, 'LMD-113', 'size'),
    (changed(NEXT, image_grid_pinpoints=[[336, 337]]), {}, 'LMD-113', 'image_grid_pinpoints'),
    (changed(NEXT, vision_feature_select_strategy='full'), {}, 'LMD-115', 'vision_feature_select_strategy'),
    (changed(QWEN, vision_config__out_hidden_size=99), {}, 'LMD-114', '99'),
    (changed(QWEN, vision_config__window_size=100), {}, 'LMD-113', 'window_size'),
    (QWEN, {'patch_size': 16}, 'LMD-114', 'patch_size'),
    (QWEN, {'min_pixels': 100, 'max_pixels': 10}, 'LMD-113', 'max_pixels'),
    (QWEN, {'max_pixels': 1 << 30}, 'LMD-113', 'max_pixels'),
    (changed(NEXT, image_grid_pinpoints=[[336 * 9, 336 * 8]]), {}, 'LMD-113', 'image_grid_pinpoints'),
    (LLAVA, {'size': {'shortest_edge': 5000}}, 'LMD-114', '336'),
    (changed(INTERN, llm_config='x'), {}, 'LMD-113', 'llm_config'),
])  # fmt: skip
def test_what_cannot_run_is_refused_by_name(config, preprocessor, code, names):
    with pytest.raises(ConfigError) as caught:
        read_vision(config, preprocessor)
    assert caught.value.code == code and names in str(caught.value)


@pytest.mark.parametrize('sections', [[1, 2, 3], [64], 'x', [16, 24, -24]])
def test_sections_that_do_not_fit_the_head(sections):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(changed(QWEN, rope_scaling={'type': 'mrope', 'mrope_section': sections}))
    assert caught.value.code == 'LMD-113' and 'mrope_section' in str(caught.value)


JUNK = [None, True, False, 0, -1, 1, 3, 10**12, 0.5, -2.5, float('inf'), '', 'x', [], [1, 2], ['x'], {}, {'x': 1}]


def places(config: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields."""
    found = []
    for name, value in config.items():
        found.append((*path, name))
        found += places(value, (*path, name)) if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize('config', [INTERN, INTERN_HF, LLAVA, NEXT, QWEN], ids=lambda c: c['architectures'][0])
def test_any_value_of_any_field_is_read_or_refused(config):
    size = 448 if 'InternVL' in config['architectures'][0] else 336
    pictures = {'size': {'shortest_edge': size}, 'crop_size': {'height': 336, 'width': 336}, 'image_mean': [0.5] * 3,
                'image_std': [0.5] * 3, 'resample': 3, 'do_rescale': True, 'rescale_factor': 1 / 255}  # fmt: skip
    if config is QWEN:
        pictures = {'size': {'shortest_edge': 3136, 'longest_edge': 10**6}, 'min_pixels': 3136, 'max_pixels': 10**6,
                    'patch_size': 14, 'merge_size': 2, 'temporal_patch_size': 2}  # fmt: skip
    read_vision(config, pictures)
    whole = {'config': config, 'pictures': pictures}
    for path in places(whole):
        for junk in JUNK:
            copy = json.loads(json.dumps(whole))
            place = copy
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = junk
            if not isinstance(copy['config'], dict) or not isinstance(copy['pictures'], dict):
                continue
            try:
                vision = read_vision(copy['config'], copy['pictures'])
                assert vision.tokens_per_tile >= 0 and len(vision.picture.levels()) == 3
                ModelConfig.from_dict(copy['config'])
            except ConfigError:
                pass
