"""The families of vision models: how each one's config.json and preprocessor_config.json are read."""

from __future__ import annotations

from typing import Any

from lmdeploy.config.fields import Fields, shown
from lmdeploy.config.vision import (
    INTERNVL,
    LLAVA,
    LLAVA_NEXT,
    MAX_TILES,
    QWEN2_5_VL,
    PictureConfig,
    Tiling,
    TowerConfig,
    TowerKind,
    VisionModelConfig,
)
from lmdeploy.config.vision_language import language_config
from lmdeploy.errors import ConfigError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BICUBIC = 3  # Pillow's number
MAX_PIXELS = 1 << 26  # of a picture in its own shape
ACTIVATIONS = {'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh', 'quick_gelu': 'quick_gelu',
               'silu': 'silu', 'relu': 'relu'}  # fmt: skip
_BASE_TOWER = {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12, 'num_attention_heads': 12}
"""What the vision_config of CLIP's and SigLIP's base models may leave out."""


def internvl(architecture: str, top: Fields, vision: Fields, pictures: Fields) -> VisionModelConfig:
    """InternVL, of the original repositories and of transformers."""
    original = architecture == INTERNVL
    image = _side(vision, 'image_size', 448)
    norm = vision.text('norm_type', 'rms_norm' if original else 'layer_norm')
    _among(vision, 'norm_type', norm, ('layer_norm', 'rms_norm'))
    ratio = top.number('downsample_ratio', 0.0, 1.0, 0.5)
    merge = round(1 / ratio)
    if merge * ratio != 1:
        raise top.bad('downsample_ratio', 'one over a whole number')
    tower = _tower(
        vision, 'intern', image, patch=_side(vision, 'patch_size', 14), activation='gelu', eps=1e-6,
        rms_norm=norm == 'rms_norm', qkv_bias=vision.flag('qkv_bias' if original else 'attention_bias', False),
        qk_norm=vision.flag('qk_normalization' if original else 'use_qk_norm', original), merge=merge,
    )  # fmt: skip
    if (image // tower.patch_size) % merge:
        raise ConfigError('LMD-114', reason=f'{image // tower.patch_size} patches a side cannot be merged by {merge}')
    if original:
        forced = top.whole('force_image_size', 1, 1 << 14, image)
        _among(top, 'force_image_size', forced, (image,))
        _among(top, 'pad2square', top.flag('pad2square', False), (False,))
        shuffle = top.text('ps_version', 'v1')
        _among(top, 'ps_version', shuffle, ('v1', 'v2'))
        least = top.whole('min_dynamic_patch', 1, MAX_TILES, 1)
        most = top.whole('max_dynamic_patch', least, MAX_TILES, max(6, least))
        if not top.flag('dynamic_image_size', False):
            least = most = 1
        thumbnail, layer = top.flag('use_thumbnail', False), top.whole('select_layer', -1024, 1024, -1)
    else:
        for name, wanted in (('use_mean_pooling', True), ('use_absolute_position_embeddings', True)):
            _among(vision, name, vision.flag(name, True), (wanted,))
        _among(top, 'vision_feature_select_strategy', top.text('vision_feature_select_strategy', 'default'),
               ('default',))
        shuffle, thumbnail, layer = 'v2', True, top.whole('vision_feature_layer', -1024, 1024, -1)
        least = pictures.whole('min_patches', 1, MAX_TILES, 1)
        most = pictures.whole('max_patches', least, MAX_TILES, max(12, least))
        _same_size(_edge(pictures, 'size', pictures.raw('size'), image), image)
    # the original code has its own constants; its preprocessor_config.json belongs to the tower alone
    mean, std = IMAGENET if original else _moments(pictures, IMAGENET)
    resample = BICUBIC if original else pictures.whole('resample', 0, 5, BICUBIC)
    picture = PictureConfig('internvl', mean, std, resample, min_tiles=least, max_tiles=most, thumbnail=thumbnail,
                            grid_order='set' if original else 'width')
    return VisionModelConfig(
        architecture, tower, picture, _language_size(top), _layer(top, layer, tower.num_layers), drop_first=True,
        shuffle='v1' if shuffle == 'v1' else 'v2',
        projector_activation=_activation(top, 'projector_hidden_act', 'gelu'),
        image_token='<IMG_CONTEXT>', image_token_id=_token(top, 'image_token_id'), before='<img>', after='</img>',
    )  # fmt: skip


def llava(architecture: str, top: Fields, vision: Fields, pictures: Fields) -> VisionModelConfig:
    """LLaVA-1.5 and LLaVA-NeXT."""
    kind = vision.text('model_type', 'clip_vision_model')
    _among(vision, 'model_type', kind, ('clip_vision_model', 'siglip_vision_model'))
    clip = kind == 'clip_vision_model'
    vision = Fields({**_BASE_TOWER, **vision.values}, vision.path)
    image = _side(vision, 'image_size', 224)
    tower = _tower(vision, 'clip' if clip else 'siglip', image, patch=_side(vision, 'patch_size', 32 if clip else 16),
                   activation='quick_gelu' if clip else 'gelu_pytorch_tanh', eps=1e-5 if clip else 1e-6)
    select = top.text('vision_feature_select_strategy', 'default')
    _among(top, 'vision_feature_select_strategy', select, ('default', 'full'))
    layer = _layer(top, top.whole('vision_feature_layer', -1024, 1024, -2), tower.num_layers)
    picture = _llava_picture(architecture, top, image, clip, pictures)
    if picture.tiling == 'anyres' and clip != (select == 'default'):
        raise ConfigError('LMD-115', field='vision_feature_select_strategy', value=shown(select),
                          known='default' if clip else 'full')
    return VisionModelConfig(
        architecture, tower, picture, _language_size(top), layer, drop_first=select == 'default',
        projector_activation=_activation(top, 'projector_hidden_act', 'gelu'),
        projector_bias=top.flag('multimodal_projector_bias', True),
        image_token_id=_token(top, 'image_token_id', 'image_token_index'),
    )  # fmt: skip


def _llava_picture(architecture: str, top: Fields, image: int, clip: bool, pictures: Fields) -> PictureConfig:
    mean, std = _moments(pictures, CLIP if clip else HALF)
    resample = pictures.whole('resample', 0, 5, BICUBIC)
    size, crop = pictures.raw('size'), pictures.raw('crop_size')
    edge = _edge(pictures, 'size', size, image)
    cropped = _edge(pictures, 'crop_size', crop, image) if pictures.flag('do_center_crop', clip) else image
    _same_size(cropped, image)
    _same_size(edge if not image <= edge <= 4 * image else image, image)
    _among(pictures, 'do_pad', pictures.flag('do_pad', architecture == LLAVA_NEXT), (architecture == LLAVA_NEXT,))
    if architecture == LLAVA:
        tiling: Tiling = 'crop' if clip else 'squash'
        return PictureConfig(tiling, mean, std, resample, resize=edge)
    source = pictures if pictures.has('image_grid_pinpoints') else top
    given = source.raw('image_grid_pinpoints') or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    wanted = f'a list of (height, width), in multiples of {image}, of at most {MAX_TILES} tiles'
    if not isinstance(given, list) or len(given) > 1024 or not all(
            isinstance(p, (list, tuple)) and len(p) == 2 and all(type(n) is int and n > 0 and n % image == 0 for n in p)
            and p[0] * p[1] <= MAX_TILES * image**2 for p in given):
        raise source.bad('image_grid_pinpoints', wanted)
    return PictureConfig('anyres', mean, std, resample, resize=edge, pinpoints=tuple((p[0], p[1]) for p in given))


def qwen(architecture: str, top: Fields, vision: Fields, pictures: Fields) -> VisionModelConfig:
    """Qwen2-VL and Qwen2.5-VL."""
    later = architecture == QWEN2_5_VL
    hidden = vision.whole('hidden_size' if later else 'embed_dim', 1, 1 << 17, 1280)
    heads = vision.whole('num_heads', 1, 1024, 16)
    patch, merge = _side(vision, 'patch_size', 14), vision.whole('spatial_merge_size', 1, 16, 2)
    if hidden % heads or hidden // heads % 4:
        raise ConfigError('LMD-114', reason=f'{hidden} channels of the tower are not {heads} heads of whole quarters')
    frames = vision.whole('temporal_patch_size', 1, 16, 2)
    for name, wanted in (('patch_size', patch), ('merge_size', merge), ('temporal_patch_size', frames)):
        if pictures.whole(name, 1, 1 << 14, wanted) != wanted:
            raise ConfigError('LMD-114', reason=f'preprocessor_config.json and the tower differ in {name}')
    intermediate = (vision.whole('intermediate_size', 1, 1 << 20, 3420) if later
                    else int(hidden * vision.number('mlp_ratio', 0.0, 64.0, 4.0)))
    layers = vision.whole('depth', 1, 1024, 32)
    window = vision.whole('window_size', 1, 1 << 14, 112) if later else 0
    full: tuple[int, ...] = ()
    if later:
        given = vision.raw('fullatt_block_indexes')
        given = [7, 15, 23, 31] if given is None else given
        if not isinstance(given, list) or not all(type(i) is int and 0 <= i < 1024 for i in given):
            raise vision.bad('fullatt_block_indexes', 'a list of numbers of layers')
        if window % (patch * merge):
            raise vision.bad('window_size', f'a multiple of {patch * merge}')
        full = tuple(given)
    language = _language_size(top)
    out = vision.whole('out_hidden_size' if later else 'hidden_size', 1, 1 << 17, language)
    if out != language:
        raise ConfigError('LMD-114', reason=f'the tower gives {out} channels, the decoder takes {language}')
    tower = TowerConfig(
        'qwen2_5' if later else 'qwen2', hidden, layers, heads, intermediate, 0, patch, 1e-6,
        _activation(vision, 'hidden_act', 'silu' if later else 'quick_gelu'), rms_norm=later, frames=frames,
        merge=merge, window=window, full_layers=full,
    )  # fmt: skip
    size = pictures.object('size') or Fields({})
    least = pictures.whole('min_pixels', 1, MAX_PIXELS, size.whole('shortest_edge', 1, MAX_PIXELS, 56 * 56))
    usual = size.whole('longest_edge', least, MAX_PIXELS, max(least, 28 * 28 * 1280))
    most = pictures.whole('max_pixels', least, MAX_PIXELS, usual)
    mean, std = _moments(pictures, CLIP)
    picture = PictureConfig('native', mean, std, pictures.whole('resample', 0, 5, BICUBIC), min_pixels=least,
                            max_pixels=most)
    return VisionModelConfig(
        architecture, tower, picture, language, image_token='<|image_pad|>',
        image_token_id=_token(top, 'image_token_id'), before='<|vision_start|>', after='<|vision_end|>', mrope=True,
    )  # fmt: skip


# -- parts -------------------------------------------------------------------------------------------------------------


def _tower(vision: Fields, kind: TowerKind, image: int, *, patch: int, activation: str, eps: float,
           rms_norm: bool = False, qkv_bias: bool = True, qk_norm: bool = False, merge: int = 1) -> TowerConfig:
    hidden, heads = vision.whole('hidden_size', 1, 1 << 17), vision.whole('num_attention_heads', 1, 1024)
    if hidden % heads:
        raise ConfigError('LMD-114', reason=f'{vision.path}hidden_size {hidden} is not a multiple of {heads} heads')
    if image % patch and kind == 'intern':
        raise ConfigError('LMD-114', reason=f'{vision.path}image_size {image} is not a multiple of {patch}')
    return TowerConfig(
        kind, hidden, vision.whole('num_hidden_layers', 1, 1024), heads,
        vision.whole('intermediate_size', 1, 1 << 20, 4 * hidden), image, patch,
        vision.number('layer_norm_eps', 0.0, 1.0, eps), _activation(vision, 'hidden_act', activation), rms_norm,
        qkv_bias, qk_norm, merge=merge,
    )  # fmt: skip


def _language_size(top: Fields) -> int:
    _, inner, path = language_config(top.values)
    return Fields(inner, path).whole('hidden_size', 1, 1 << 17)


def _layer(top: Fields, layer: int, layers: int) -> int:
    """A layer counted from the last, as -1; its number counts the input of the first layer as 0."""
    if not -layers - 1 <= layer <= layers:
        raise ConfigError('LMD-114', reason=f'the tower has {layers} layers, but layer {layer} is asked for')
    return layer if layer < 0 else layer - layers - 1


def _side(fields: Fields, name: str, default: int) -> int:
    """A length in pixels, that may be written as a pair of equal ones."""
    value = fields.raw(name)
    if isinstance(value, (list, tuple)):
        if len(value) != 2 or value[0] != value[1] or type(value[0]) is not int:
            raise fields.bad(name, 'a length in pixels, or two that are equal')
        return Fields({name: value[0]}, fields.path).whole(name, 1, 1 << 14)
    return fields.whole(name, 1, 1 << 14, default)


def _edge(fields: Fields, name: str, value: Any, default: int) -> int:
    """The length that ``size`` or ``crop_size`` means: a number, ``shortest_edge``, or equal height and width."""
    if value is None:
        return default
    if isinstance(value, dict):
        sides = [value[key] for key in ('shortest_edge', 'height', 'width') if value.get(key) is not None]
        value = sides[0] if sides and all(side == sides[0] for side in sides) else None
    if type(value) is not int or not 0 < value <= 1 << 14:
        raise fields.bad(name, 'a length in pixels')
    return value


def _same_size(found: int, wanted: int) -> None:
    if found != wanted:
        raise ConfigError('LMD-114', reason=f'pictures are cropped to {found} pixels, but the tower takes {wanted}')


def _moments(pictures: Fields, usual: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """Mean and deviation of every channel."""
    for name in ('do_rescale', 'do_normalize', 'do_resize'):
        _among(pictures, name, pictures.flag(name, True), (True,))
    factor = pictures.number('rescale_factor', 0.0, 1.0, 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise pictures.bad('rescale_factor', '1/255')
    found = []
    for name, default in zip(('image_mean', 'image_std'), usual):
        found.append(pictures.floats(name, 3) if pictures.has(name) else default)
    return tuple(found)


def _activation(fields: Fields, name: str, default: str) -> str:
    value = fields.text(name, default)
    _among(fields, name, value, tuple(ACTIVATIONS))
    return ACTIVATIONS[value]


def _token(top: Fields, *names: str) -> int | None:
    return next((top.whole(name, 0, 1 << 22) for name in names if top.has(name)), None)


def _among(fields: Fields, name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ConfigError('LMD-115', field=fields.path + name, value=shown(value), known=', '.join(map(str, known)))
