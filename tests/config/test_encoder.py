"""An encoder's config.json and its pooling files: what is read, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from lmdeploy.config.encoder import EncoderConfig, Pooling, is_encoder, refuse_encoder
from lmdeploy.errors import ConfigError

BERT = {'architectures': ['BertModel'], 'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2,
        'intermediate_size': 16, 'vocab_size': 20, 'max_position_embeddings': 12, 'layer_norm_eps': 1e-12}
TRANSFORMER, POOL, NORMALISE = ({'type': f'sentence_transformers.models.{name}', 'path': path} for name, path in (
    ('Transformer', ''), ('Pooling', '1_Pooling'), ('Normalize', '2_Normalize')))
MEAN = {'pooling_mode_mean_tokens': True, 'pooling_mode_cls_token': False}


def test_roberta_begins_behind_its_padding_position():
    assert EncoderConfig.from_dict(BERT).context_len == 12
    roberta = EncoderConfig.from_dict(BERT | {'architectures': ['XLMRobertaModel'], 'pad_token_id': 1})
    assert (roberta.first_position, roberta.context_len) == (2, 10)


@pytest.mark.parametrize('change, code, names', [
    ({'architectures': ['LlamaForCausalLM']}, 'LMD-110', 'LlamaForCausalLM'),
    ({'architectures': None}, 'LMD-110', 'BertModel'),
    ({'hidden_size': 9}, 'LMD-114', '9'),
    ({'hidden_size': -1}, 'LMD-113', 'hidden_size'),
    ({'vocab_size': None}, 'LMD-112', 'vocab_size'),
    ({'hidden_act': 'swish'}, 'LMD-115', 'hidden_act'),
    ({'position_embedding_type': 'relative_key'}, 'LMD-115', 'relative_key'),
    ({'is_decoder': True}, 'LMD-115', 'is_decoder'),
    ({'is_decoder': 'yes'}, 'LMD-113', 'is_decoder'),
    ({'torch_dtype': 'int8'}, 'LMD-115', 'int8'),
    ({'layer_norm_eps': 0}, 'LMD-113', 'layer_norm_eps'),
    ({'architectures': ['RobertaModel'], 'pad_token_id': 11}, 'LMD-114', '12'),
])
def test_what_cannot_run_is_refused_by_name(change, code, names):
    with pytest.raises(ConfigError) as caught:
        EncoderConfig.from_dict(BERT | change)
    assert caught.value.code == code and names in str(caught.value)
    assert names in caught.value.text('zh')


def test_pooling_is_what_the_modules_say():
    assert Pooling.from_modules([], {}, {}) == Pooling('mean', True, 0)
    assert Pooling.from_modules([TRANSFORMER, POOL], MEAN, {'max_seq_length': 7}) == Pooling('mean', False, 7)
    assert Pooling.from_modules([TRANSFORMER, POOL, NORMALISE], {'pooling_mode_cls_token': True}, {}) == Pooling('cls')


@pytest.mark.parametrize('modules, pooling', [
    ([TRANSFORMER, POOL, {'type': 'sentence_transformers.models.Dense'}], MEAN),
    ([TRANSFORMER, POOL], MEAN | {'pooling_mode_cls_token': True}),
    ([TRANSFORMER, POOL], {'pooling_mode_lasttoken': True}),
    ([TRANSFORMER, POOL], {}),
])
def test_other_ways_of_pooling_are_refused(modules, pooling):
    with pytest.raises(ConfigError) as caught:
        Pooling.from_modules(modules, pooling, {})
    assert caught.value.code == 'LMD-115'


def test_a_folder_is_known_by_its_architecture(tmp_path):
    assert not is_encoder(tmp_path)
    for text in ('{', '[]', '{}', '{"architectures": [1]}', '{"architectures": ["LlamaForCausalLM"]}'):
        (tmp_path / 'config.json').write_text(text)
        assert not is_encoder(tmp_path)
        refuse_encoder(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(BERT))
    assert is_encoder(tmp_path)
    with pytest.raises(ConfigError) as caught:
        refuse_encoder(tmp_path)
    assert caught.value.code == 'LMD-119' and '/v1/embeddings' in str(caught.value)
