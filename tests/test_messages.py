"""The public dataclasses: field order and repr are part of the interface."""

from __future__ import annotations

from dataclasses import fields

from lmdeploy import GenerationConfig, Response, VisionConfig


def test_response_prints_as_the_tutorial_shows():
    response = Response(text='Hi', generate_token_len=1, input_token_len=2, finish_reason='stop', token_ids=[7],
                        error_code='LMD-1', error_message='hidden', cached_tokens=3)
    assert repr(response) == ("Response(text='Hi', generate_token_len=1, input_token_len=2, finish_reason='stop', "
                              'token_ids=[7], logprobs=None, logits=None, last_hidden_state=None, index=0)')


def test_generation_config_defaults():
    config = GenerationConfig()
    assert (config.n, config.max_new_tokens, config.do_sample) == (1, 512, False)
    assert (config.top_p, config.top_k, config.min_p, config.temperature) == (1.0, 50, 0.0, 0.8)
    assert [spec.name for spec in fields(config)][:4] == ['n', 'max_new_tokens', 'do_sample', 'top_p']


def test_vision_config_of_the_tutorial():
    assert VisionConfig() == VisionConfig(max_batch_size=1, thread_safe=False)


class Words:
    """A tokenizer of which ``indexes_containing_token`` is known."""

    def indexes_containing_token(self, word):
        return {'end': [4], 'swear': [7, 8]}.get(word, [])


def test_words_become_token_ids_beside_those_that_are_there():
    config = GenerationConfig(stop_words=['end', 'of many tokens'], stop_token_ids=[9], bad_words=['swear'])
    config.convert_stop_bad_words_to_ids(Words())
    assert (config.stop_token_ids, config.bad_token_ids) == ([4, 9], [7, 8])
    assert config.stop_words == ['end', 'of many tokens']
    config = GenerationConfig()
    config.convert_stop_bad_words_to_ids(Words())
    assert (config.stop_token_ids, config.bad_token_ids) == (None, None)


def test_end_tokens_of_a_model_become_stop_tokens():
    config = GenerationConfig(stop_token_ids=[5])
    config.update_from_hf_gen_cfg({'eos_token_id': [2, 3]}, 1)
    assert config.stop_token_ids == [1, 2, 3, 5]
    config = GenerationConfig()
    config.update_from_hf_gen_cfg({'eos_token_id': 2}, None)
    assert config.stop_token_ids == [2]
    config = GenerationConfig()
    config.update_from_hf_gen_cfg({}, None)
    assert config.stop_token_ids is None
