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
