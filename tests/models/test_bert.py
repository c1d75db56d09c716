"""Encoders against transformers: hidden states of texts of unequal lengths, and what is pooled from them."""

from __future__ import annotations

import pytest
import torch
import transformers

from lmdeploy.config.encoder import EncoderConfig, Pooling
from lmdeploy.errors import LoadError
from lmdeploy.models.bert import IGNORE, Bert, Texts, pool
from lmdeploy.nn.build import Build
from lmdeploy.weights.checkpoint import open_checkpoint
from tests.toy_encoder import write_encoder

CPU = torch.device('cpu')
LENGTHS = [5, 1, 30, 12]
KINDS = [('Bert', 'Model', {}), ('Bert', 'ForMaskedLM', {}), ('Bert', 'Model', {'hidden_act': 'gelu_new'}),
         ('Bert', 'Model', {'hidden_act': 'relu', 'type_vocab_size': 1}), ('Roberta', 'Model', {'pad_token_id': 1}),
         ('Roberta', 'ForMaskedLM', {}), ('XLMRoberta', 'Model', {})]


def load(folder) -> Bert:
    with open_checkpoint(folder) as checkpoint:
        model = Bert(EncoderConfig.from_dict(checkpoint.config), Build())
        model.load(checkpoint.prefix())
        checkpoint.finish(IGNORE)
    return model


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.no_grad()
@pytest.mark.parametrize('kind, head, options', KINDS)
def test_hidden_states_are_those_of_transformers(tmp_path, kind, head, options):
    folder = write_encoder(tmp_path / 'model', kind, head, **options)
    oracle = getattr(transformers, f'{kind}Model').from_pretrained(folder, add_pooling_layer=False).eval()
    model = load(folder)
    texts = prompts(model.config.vocab_size)
    found = model(torch.tensor(sum(texts, [])), Texts.of(LENGTHS, CPU)).split(LENGTHS)
    for ids, mine in zip(texts, found):
        wanted = oracle(torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(mine, wanted, atol=1e-4, rtol=1e-4)
        alone = model(torch.tensor(ids), Texts.of([len(ids)], CPU))
        assert torch.allclose(alone, mine, atol=1e-5, rtol=1e-5)  # whoever it shares a step with


@pytest.mark.parametrize('normalise', [False, True])
@pytest.mark.parametrize('mode', ['mean', 'cls', 'max'])
def test_a_vector_is_pooled_from_the_texts_own_tokens(mode, normalise):
    hidden = torch.randn(sum(LENGTHS), 8, generator=torch.Generator().manual_seed(2)) - 3  # a padding of 0 would be max
    vectors = pool(hidden, Texts.of(LENGTHS, CPU), Pooling(mode, normalise))
    for mine, rows in zip(vectors, hidden.split(LENGTHS)):
        wanted = {'mean': rows.mean(0), 'cls': rows[0], 'max': rows.max(0).values}[mode]
        assert torch.allclose(mine, wanted / wanted.norm() if normalise else wanted, atol=1e-5)


def test_old_names_of_the_norms_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_encoder(tmp_path / 'model')
    new = load(folder)
    tensors = load_file(folder / 'model.safetensors')
    save_file({name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): tensor
               for name, tensor in tensors.items()}, folder / 'model.safetensors')
    ids, texts = torch.arange(5, 12), Texts.of([7], CPU)
    assert torch.equal(load(folder)(ids, texts), new(ids, texts))


def test_a_missing_and_a_left_over_tensor_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_encoder(tmp_path / 'model')
    tensors = load_file(folder / 'model.safetensors')
    name = 'encoder.layer.1.output.dense.bias'
    save_file({k: v for k, v in tensors.items() if k != name}, folder / 'model.safetensors')
    with pytest.raises(LoadError, match=name):
        load(folder)
    save_file(tensors | {'encoder.layer.9.x': torch.zeros(1)}, folder / 'model.safetensors')
    with pytest.raises(LoadError, match='encoder.layer.9.x'):
        load(folder)
