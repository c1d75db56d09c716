"""Pictures in the engine: one short story each. The simulation has them in all mixtures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lmdeploy.config.vision import Layout
from lmdeploy.engine.core import EngineCore
from lmdeploy.engine.fake import FakeExecutor, continuation, next_token, with_pictures
from lmdeploy.engine.plan import NO_MEMORY, PictureRoom
from lmdeploy.engine.request import EngineInput, ImageSpan
from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import RequestError
from lmdeploy.executor.base import Capacity

VOCAB = 1000
ROOM = PictureRoom(tokens=40, patches=2, patches_alone=8)


class Recorder(FakeExecutor):
    """Keeps the plans."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.plans = []

    def launch(self, plan):
        self.plans.append(plan)
        return super().launch(plan)

    def encoded(self):
        """Tiles per step."""
        return [sum(len(encode.pixels) for encode in plan.encode) for plan in self.plans]


def make(*, room=ROOM, blocks=64, size=4, budget=64, slots=8, depth=1, prefix=False, executor=Recorder):
    capacity = Capacity(num_blocks=blocks, block_size=size, max_batch_size=slots, max_step_tokens=budget,
                        session_len=200, vocab_size=VOCAB, pictures=room)
    return EngineCore(executor(capacity), capacity, depth=depth, prefix_caching=prefix, debug=True)


def picture(which=0, tiles=2, each=4):
    """A picture of ``tiles * each`` tokens, each tile of one patch."""
    pixels = np.full((tiles, 3, 1, 1), which, np.uint8)
    pixels[:, 1, 0, 0] = range(tiles)
    return ImageSpan(0, tiles * each, bytes([which, tiles]), Layout((1, 1), (1, 1), tiles, tiles * each, tiles), pixels)


def ask(name, *parts, **params):
    """A request of token lists and pictures."""
    tokens, spans = [], []
    for part in parts:
        if isinstance(part, ImageSpan):
            spans.append(replace(part, start=len(tokens), end=len(tokens) + part.end))
            tokens += [0] * part.end
        else:
            tokens += part
    return EngineInput(name, tokens, SamplingParams(**params), images=tuple(spans))


def serve(core, *requests):
    for request in requests:
        core.submit(request)
    return drain(core, {request.id: [] for request in requests})


def drain(core, found):
    turns = 10_000
    while not core.idle:
        assert (turns := turns - 1), 'it does not end'
        for delta in core.step():
            found.setdefault(delta.id, []).append(delta)
        core.check()
    return found


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.tokens]


def alone(request):
    """What the request says alone."""
    return continuation(with_pictures(request.tokens, request.images).tolist(), request.params, VOCAB, 200)[0]


@pytest.mark.parametrize('depth', [1, 2])
def test_a_picture_is_read_after_its_tiles_are_encoded(depth):
    core = make(depth=depth)
    request = ask('a', [5, 6], picture(1), [7], picture(2, 3), max_new_tokens=5)
    assert tokens_of(serve(core, request)['a']) == alone(request)
    assert core.executor.encoded()[0] == 5  # nobody waits for text: all at once
    assert core.executor.plans[0].num_tokens == len(request.tokens)


def test_a_chunk_may_end_within_a_picture():
    core = make(budget=3)
    request = ask('a', [5], picture(1, 5), [7, 8], max_new_tokens=4)
    assert tokens_of(serve(core, request)['a']) == alone(request)
    assert core.executor.encoded_tiles == 5


def test_tiles_of_several_requests_are_encoded_together():
    core = make()
    requests = [ask(f'{i}', [i + 1], picture(i, 1), max_new_tokens=2) for i in range(8)]
    found = serve(core, *requests)
    assert all(tokens_of(found[request.id]) == alone(request) for request in requests)
    assert core.executor.encoded()[0] == 8 and core.executor.encoded_tiles == 8


def test_running_texts_keep_their_pace():
    core = make(room=PictureRoom(40, 2, 8))
    core.submit(ask('text', [1, 2, 3], max_new_tokens=60))
    for _ in range(3):
        core.step()
    before = len(core.executor.plans)
    serve(core, ask('a', picture(1, 8, 1), picture(2, 8, 1), [5], max_new_tokens=2))
    encoded = core.executor.encoded()[before:]
    assert max(encoded) == 2 and sum(encoded) == 16
    assert all(plan.rows for plan in core.executor.plans[before:])


def test_a_tile_that_is_more_than_the_budget_waits_for_its_turns():
    dear = replace(picture(1, 2), layout=Layout((1, 1), (1, 1), 2, 8, 20))  # ten patches a tile
    core = make(room=PictureRoom(40, 4, 8))
    core.submit(ask('text', [1, 2, 3], max_new_tokens=40))
    core.step()
    before = len(core.executor.plans)
    request = ask('a', dear, [5], max_new_tokens=2)
    assert tokens_of(serve(core, request)['a']) == alone(request)
    steps = [i for i, count in enumerate(core.executor.encoded()[before:]) if count]
    assert len(steps) == 2 and steps[1] - steps[0] >= 3  # 4 patches a step on average


def test_the_users_number_of_pictures_is_a_limit():
    core = make(room=PictureRoom(40, 8, 8, pictures=2))
    serve(core, *(ask(f'{i}', [i + 1], picture(i, 1), max_new_tokens=2) for i in range(5)))
    assert core.executor.encoded()[:3] == [2, 2, 1]


def test_a_picture_that_is_kept_is_not_encoded_again():
    core = make()
    serve(core, ask('a', [5], picture(1), max_new_tokens=2), ask('b', [6], picture(1), max_new_tokens=2))
    assert core.executor.encoded_tiles == 2
    follow_up = ask('c', [5], picture(1), [9, 9, 9], max_new_tokens=2)
    assert tokens_of(serve(core, follow_up)['c']) == alone(follow_up)
    assert core.executor.encoded_tiles == 2


def test_pictures_of_one_size_are_never_mixed_up_by_the_prefix_cache():
    core = make(prefix=True)
    requests = [ask(f'{i}', [5, 6, 7, 8], picture(which), [9], max_new_tokens=3)
                for i, which in enumerate([1, 2, 1, 2])]
    for request in requests:
        assert tokens_of(serve(core, request)[request.id]) == alone(request)
    assert core.stats().prefix_hit_tokens == 4 + 2 * 12  # what is before the pictures, and all of the last two


def test_a_prompt_found_in_the_cache_needs_no_picture():
    core = make(prefix=True)
    request = ask('a', picture(1), [9, 9, 9, 9, 9], max_new_tokens=2)
    serve(core, request)
    serve(core, *(ask(f'{i}', picture(10 + i, 2, 5), [1], max_new_tokens=1) for i in range(4)))  # it is evicted
    tiles = core.executor.encoded_tiles
    again = replace(request, id='b')
    assert tokens_of(serve(core, again)['b']) == alone(request)
    assert core.executor.encoded_tiles == tiles


def test_room_is_made_by_forgetting_the_oldest():
    core = make(room=PictureRoom(16, 8, 8))
    for which in (1, 2, 3, 1):
        request = ask(f'{core.stats().accepted}', [5], picture(which), max_new_tokens=2)
        assert tokens_of(serve(core, request)[request.id]) == alone(request)
    assert core.executor.encoded_tiles == 8
    assert [digest[0] for plan in core.executor.plans for digest in plan.forget] == [1, 2]


def test_requests_that_wait_for_each_others_pictures_go_on():
    """The first needs the room that the second holds, the second needs the first's blocks."""
    core = make(room=PictureRoom(8, 8, 8), blocks=8, slots=2, budget=4)
    requests = [ask('a', [1] * 9, picture(1), max_new_tokens=3), ask('b', picture(2), [2] * 9, max_new_tokens=3)]
    found = serve(core, *requests)
    assert all(tokens_of(found[request.id]) == alone(request) for request in requests)


def test_answers_of_one_prompt_share_its_picture():
    core = make()
    requests = [replace(ask(f'{i}', [5] * 4, picture(1), [6], max_new_tokens=4), share='g') for i in range(3)]
    found = serve(core, *requests)
    assert all(tokens_of(found[request.id]) == alone(request) for request in requests)
    assert core.executor.encoded_tiles == 2


def test_an_aborted_request_leaves_no_half_encoded_picture():
    core = make(room=PictureRoom(40, 8, 1))
    core.submit(ask('a', picture(1, 4), [5], max_new_tokens=2))
    core.step()
    core.abort('a')
    request = ask('b', picture(1, 4), [5], max_new_tokens=2)
    assert tokens_of(serve(core, request)['b']) == alone(request)
    assert core.executor.encoded_tiles == 1 + 4


class Poor(Recorder):
    """Has no memory for pictures of odd number."""

    def run(self, plan):
        bad = [encode for encode in plan.encode if encode.picture[0] % 2]
        result = super().run(replace(plan, places=() if bad else plan.places))
        if bad:
            for encode in plan.encode:
                self.pictures.pop(encode.picture)
            result.lost = 'no memory'
            result.status[:] = NO_MEMORY
        return result


def test_pictures_without_memory_fail_those_who_wait_for_them_alone():
    core = make(room=PictureRoom(40, 1, 1), executor=Poor)
    bad, good = ask('bad', picture(1, 3), [5], max_new_tokens=2), ask('good', picture(2, 3), [5], max_new_tokens=2)
    found = serve(core, bad)
    assert found['bad'][-1].finish.error.code == 'LMD-207'
    assert tokens_of(serve(core, good)['good']) == alone(good)
    assert serve(core, replace(bad, id='again'))['again'][-1].finish.error.code == 'LMD-207'
    assert not core.scheduler.pictures.pictures.keys() & {picture(1, 3).digest}


@pytest.mark.parametrize('change, code', [
    (lambda span: replace(span, end=span.end - 1), 'LMD-677'),
    (lambda span: replace(span, end=span.end + 9, start=span.start + 9), 'LMD-677'),
    (lambda span: replace(span, start=-1, end=7), 'LMD-677'),
    (lambda span: replace(span, pixels=span.pixels[:1]), 'LMD-677'),
    (lambda span: replace(span, pixels=span.pixels[0]), 'LMD-677'),
])
def test_spans_that_do_not_fit_are_refused(change, code):
    core, request = make(), ask('a', [1], picture(1), [2])
    request.images = tuple(map(change, request.images))
    error = serve(core, request)['a'][-1].finish.error
    assert isinstance(error, RequestError) and error.code == code


def test_pictures_need_room_and_a_model_that_reads_them():
    assert serve(make(room=None), ask('a', [1], picture(1), [2]))['a'][-1].finish.error.code == 'LMD-677'
    core = make(room=PictureRoom(7, 1, 1))
    assert serve(core, ask('a', [1], picture(1), [2]))['a'][-1].finish.error.code == 'LMD-676'


def test_a_prompt_may_end_with_a_picture():
    core = make()
    request = ask('a', [5, 6], picture(1, 1, 1), max_new_tokens=3)
    assert tokens_of(serve(core, request)['a']) == alone(request)
    sequence = with_pictures(request.tokens, request.images)
    assert alone(request)[0] == next_token(sequence, VOCAB)
