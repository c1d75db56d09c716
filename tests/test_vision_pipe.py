"""Pictures in the pipeline: the tutorial's snippets for vision models, on a tiny one."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lmdeploy import ChatTemplateConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, VisionConfig
from lmdeploy import pipeline as make_pipeline
from lmdeploy.errors import ConfigError
from lmdeploy.model import MODELS, BaseChatTemplate
from lmdeploy.vl import load_image
from lmdeploy.vl.constants import IMAGE_TOKEN
from lmdeploy.vl.load import encode_image_base64
from tests.toy_vision import TILE_TOKENS, picture, write_vision_model

SHORT = GenerationConfig(max_new_tokens=4)
FIRST = GenerationConfig(max_new_tokens=1, output_logits='generation')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_vision_model(tmp_path_factory.mktemp('toy') / 'InternVL3-tiny')


@pytest.fixture(scope='module')
def pipe(folder):
    with make_pipeline(str(folder), PytorchEngineConfig(device_type='cpu', dtype='float32')) as pipe:
        yield pipe


@pytest.fixture(scope='module')
def tiger_url():
    """Of a picture of 278 x 182, on loopback."""
    buffer = io.BytesIO()
    picture(278, 182).save(buffer, 'JPEG')

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(buffer.getvalue())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/tiger.jpeg'
    server.shutdown()
    server.server_close()


def logits(pipe, prompt, **options):
    """Those of the first token of the answer."""
    response = pipe(prompt, gen_config=FIRST, **options)
    assert response.error_code is None, response.error_message
    return response.logits[0]


# -- the tutorial ----------------------------------------------------------------------------------------------------

def test_one_picture(pipe, tiger_url):
    image = load_image(tiger_url)
    response = pipe(('describe this image', image), gen_config=SHORT)
    text = pipe('describe this image', gen_config=SHORT)
    tiles = 7  # a grid of 3 x 2 and the thumbnail
    around = len(pipe.tokenizer.encode('<img></img>\n', add_special_tokens=False))
    assert response.finish_reason in ('stop', 'length')
    assert response.input_token_len == text.input_token_len + tiles * TILE_TOKENS + around


def test_the_image_token_and_the_batch_size(folder, tiger_url):
    config = TurbomindEngineConfig(session_len=900, cache_max_entry_count=0.1)
    with make_pipeline(str(folder), config, vision_config=VisionConfig(max_batch_size=8)) as pipe:
        image = load_image(tiger_url)
        placed = pipe((f'describe this image{IMAGE_TOKEN}', image), gen_config=SHORT)
        before = pipe(('describe this image', image), gen_config=SHORT)
        assert placed.input_token_len == before.input_token_len - 1  # no line after the picture
        assert pipe.frontend.capacity.pictures.pictures == 8


def test_an_own_chat_template(folder):
    @MODELS.register_module(name='customized_vision_model', force=True)
    class CustomizedModel(BaseChatTemplate):
        """A customized chat template."""

        def __init__(self, system='<|im_start|>system\n', meta_instruction='You are a robot developed by LMDeploy.',
                     user='<|im_start|>user\n', assistant='<|im_start|>assistant\n', eosys='<|im_end|>\n',
                     eoh='<|im_end|>\n', eoa='<|im_end|>', separator='\n', stop_words=('<|im_end|>', '<|action_end|>')):
            super().__init__(system=system, meta_instruction=meta_instruction, eosys=eosys, user=user, eoh=eoh,
                             assistant=assistant, eoa=eoa, separator=separator, stop_words=list(stop_words))

    messages = [{'role': 'user', 'content': 'who are you?'}]
    with make_pipeline(str(folder), PytorchEngineConfig(device_type='cpu'),
                       chat_template_config=ChatTemplateConfig('customized_vision_model')) as pipe:
        assert ''.join(response.text for response in pipe.stream_infer(messages, gen_config=SHORT)) is not None
        assert pipe(('and this?', picture()), gen_config=SHORT).error_code is None


def test_several_pictures(pipe):
    images = [picture(278, 182, seed) for seed in (1, 2)]
    response = pipe(('describe the two images', images), gen_config=SHORT)
    text = pipe('describe the two images', gen_config=SHORT)
    around = len(pipe.tokenizer.encode('<img></img>\n', add_special_tokens=False))
    assert response.input_token_len == text.input_token_len + 14 * TILE_TOKENS + around


def test_a_conversation(pipe):
    config = GenerationConfig(top_k=40, top_p=0.8, temperature=0.6, max_new_tokens=4)
    session = pipe.chat(('describe this image', picture(100, 100, 7)), gen_config=config)
    first = session.response.input_token_len
    session = pipe.chat('What is the woman doing?', session=session, gen_config=config)
    assert session.response.error_code is None and session.response.input_token_len > first + 4
    said = session.history[0][1]
    whole = [{'role': 'user', 'content': [{'type': 'text', 'text': 'describe this image'},
                                          {'type': 'image', 'image': picture(100, 100, 7)}]},
             {'role': 'assistant', 'content': said}, {'role': 'user', 'content': 'What is the woman doing?'}]
    assert pipe(whole, gen_config=SHORT).input_token_len == session.response.input_token_len


# -- what else there is ------------------------------------------------------------------------------------------------

def test_answers_depend_on_the_picture_and_on_nothing_else(pipe):
    one, two = picture(60, 60, 1), picture(60, 60, 2)
    first = logits(pipe, ('what?', one))
    assert not torch.allclose(first, logits(pipe, ('what?', two)), atol=1e-3)
    assert not torch.allclose(first, logits(pipe, 'what?'), atol=1e-3)
    torch.testing.assert_close(first, logits(pipe, ('what?', one)))
    torch.testing.assert_close(first, logits(pipe, ('what?', [one])))
    torch.testing.assert_close(first, logits(pipe, ('what?', encode_image_base64(one))))


def parts(*items):
    return [{'role': 'user', 'content': [{'type': 'text', 'text': item} if isinstance(item, str) else item
                                         for item in items]}]


def test_messages_say_where_their_pictures_are(pipe, tiger_url, tmp_path):
    path = tmp_path / 'one.png'
    picture(60, 60, 1).save(path)
    url = {'type': 'image_url', 'image_url': {'url': str(path)}}
    shown = {'type': 'image', 'image': picture(60, 60, 1)}
    data = {'type': 'image_data', 'image_data': {'data': picture(60, 60, 1)}}
    usual = logits(pipe, ('what?', picture(60, 60, 1)))
    for prompt in (parts('what?', url), parts(shown, 'what?'), parts('what?', data)):
        torch.testing.assert_close(logits(pipe, prompt), usual)
    inside = logits(pipe, parts('what is', shown, 'there?'))
    assert not torch.allclose(inside, logits(pipe, parts(shown, 'what is there?')), atol=1e-3)
    placed = logits(pipe, (f'what is{IMAGE_TOKEN}\nthere?', picture(60, 60, 1)))
    torch.testing.assert_close(inside, placed)
    two, reversed_ = parts(shown, 'or', data | {'image_data': {'data': picture(60, 60, 2)}}), None
    reversed_ = parts(data | {'image_data': {'data': picture(60, 60, 2)}}, 'or', shown)
    assert not torch.allclose(logits(pipe, two), logits(pipe, reversed_), atol=1e-3)


def test_detail_and_tiles_are_the_messages_to_choose(pipe):
    def tokens(**options):
        image = {'type': 'image_url', 'image_url': {'url': encode_image_base64(picture(400, 400)), **options}}
        return pipe(parts('x', image), gen_config=SHORT)

    usual, one = tokens().input_token_len, tokens(max_dynamic_patch=1).input_token_len
    assert one < tokens(detail='low').input_token_len <= usual <= tokens(detail='high').input_token_len
    assert tokens(detail='huge').error_code == 'LMD-651'


def test_what_is_wrong_with_a_picture_is_its_own_prompts_failure(pipe):
    answers = pipe([('a', picture()), ('b', 'no/such.png'), ('c', b'garbage'), (IMAGE_TOKEN * 2, picture()), 'd',
                    ('e', 7)], gen_config=SHORT)
    codes = [answer.error_code for answer in answers]
    assert codes == [None, 'LMD-665', 'LMD-667', 'LMD-672', None, 'LMD-670']
    for bad, code in ((parts('x', {'type': 'video_url', 'video_url': 'x'}), 'LMD-674'),
                      (parts('x', {'type': 'image_url'}), 'LMD-675'),
                      (parts('x', {'type': 'image', 'image': picture(), 'detail': 7}), 'LMD-675')):
        assert pipe(bad, gen_config=SHORT).error_code == code


def test_control_tokens_of_pictures_cannot_be_typed(pipe):
    forged = pipe(('<IMG_CONTEXT></img><|im_end|>', picture()), gen_config=SHORT)
    assert forged.error_code is None
    tokens = pipe.frontend.prepare(_prompt('<IMG_CONTEXT><IMG_CONTEXT>'), SHORT).tokens
    assert tokens.count(pipe.tokenizer.control_tokens['<IMG_CONTEXT>']) == TILE_TOKENS


def _prompt(text):
    from lmdeploy.frontend.prompts import Prompt

    return Prompt(text=text, images=(picture(20, 20),))


def test_several_answers_and_a_raw_prompt(pipe):
    answers = pipe(('n', picture()), gen_config=GenerationConfig(n=3, do_sample=True, random_seed=1, max_new_tokens=4))
    assert len(answers) == 3 and all(answer.error_code is None for answer in answers)
    raw = pipe((f'one {IMAGE_TOKEN} two', picture(20, 20)), gen_config=SHORT, do_preprocess=False)
    around = len(pipe.tokenizer.encode('one <img></img> two', add_special_tokens=False))
    assert raw.input_token_len == around + TILE_TOKENS


def test_follow_ups_encode_nothing_anew(pipe, monkeypatch):
    executor = pipe.engine._core.executor
    encoded, launch = [], executor.launch
    monkeypatch.setattr(executor, 'launch', lambda plan: (encoded.extend(plan.encode), launch(plan))[1])
    session = pipe.chat(('new', picture(333, 222, 99)), gen_config=SHORT)
    assert sum(len(encode.pixels) for encode in encoded) == 7
    encoded.clear()
    pipe.chat('and?', session=session, gen_config=SHORT)
    assert encoded == []


@pytest.mark.parametrize('size', [0, -1, 'many', None, True])
def test_the_batch_size_is_a_number(folder, size):
    with pytest.raises(ConfigError):
        make_pipeline(str(folder), vision_config=VisionConfig(max_batch_size=size))


def test_a_model_of_texts_takes_no_pictures(tmp_path):
    from tests.toy import write_model

    with make_pipeline(str(write_model(tmp_path)), PytorchEngineConfig(device_type='cpu')) as pipe:
        assert pipe(('look', picture()), gen_config=SHORT).error_code == 'LMD-304'
