"""Every rule of the bookkeeping is needed: breaking any one of them is noticed by the simulation."""

from __future__ import annotations

import importlib
import inspect
import logging
import types
from dataclasses import dataclass

import pytest

from lmdeploy.engine.simulate import simulate

SEEDS, TURNS = range(400), 60


@dataclass(frozen=True)
class Mutation:
    """``old`` stands exactly once in the source of ``module`` and becomes ``new``."""

    name: str
    module: str
    old: str
    new: str


MUTATIONS = [
    # overlap: unknown tokens, launched steps
    Mutation('pending is not counted', 'scheduler',
             'request.pending += 1 + len(drafts)', 'request.pending += len(drafts)'),
    Mutation('pending of steady rows is not counted', 'scheduler',
             'request.pending = pending + 1', 'request.pending = pending'),
    Mutation('pending is not taken back', 'scheduler', 'request.pending -= drawn', 'request.pending -= min(drawn, 0)'),
    Mutation('a row that needs host knowledge overlaps', 'scheduler', 'or (request.serial and pending)', ''),
    Mutation('rejected drafts stay computed', 'scheduler', 'request.computed -= rejected', 'request.computed -= 0'),
    Mutation('rejected drafts count as settled', 'scheduler',
             'min(start + length - rejected, len(tokens))', 'min(start + length, len(tokens) + rejected)'),
    Mutation('drafts beyond the limit', 'scheduler',
             'request.limit - request.total - 1', 'request.limit - request.total + 2'),
    Mutation('launched beyond the limit', 'scheduler',
             '(total >= request.limit and start >= request.prompt_len) or ', ''),
    # the only exit
    Mutation('blocks and slot go back while a step touches them', 'scheduler',
             'if request.slot >= 0 and not request.in_flight:', 'if request.slot >= 0:'),
    Mutation('an ended request keeps its slot', 'scheduler', 'elif not request.in_flight:', 'elif False:'),
    Mutation('blocks are freed twice', 'scheduler',
             'self.pool.release(request.blocks)\n        self.by_slot',
             'self.pool.release(request.blocks * 2)\n        self.by_slot'),
    Mutation('the runner is not told of closed slots', 'scheduler', 'self._closed.append(request.slot)', 'pass'),
    Mutation('an abort is forgotten in the queue', 'scheduler', 'elif not parked:', 'elif parked:'),
    # preemption
    Mutation('requests with launched steps are preempted', 'scheduler',
             'while at >= after and running[at].in_flight:', 'while at < 0:'),
    Mutation('admission in a turn that preempted', 'scheduler', 'if settled and not', 'if not'),
    Mutation('the first is preempted, not the last', 'scheduler', 'at = len(running) - 1', 'at = 0; after = 0'),
    Mutation('a preempted request keeps its position', 'scheduler',
             'request.computed = request.settled = request.published = 0\n',
             'request.settled = request.published = 0\n'),
    Mutation('the latest never sits out', 'scheduler', 'if end > at:\n                            end -= 1', 'pass'),
    Mutation('rows are planned without blocks', 'scheduler', 'if not enough:', 'if False:'),
    # prefix cache
    Mutation('blocks are published at launch', 'scheduler',
             'request.in_flight += 1\n        if sample:',
             'request.in_flight += 1\n        request.settled = min(request.computed, len(request.tokens))\n'
             '        if request.settled >= request.publish_at: self._publish(request)\n        if sample:'),
    Mutation('a match covers all tokens', 'scheduler',
             'min((len(request.tokens) - 1) // self.block_size, request.publish_limit)',
             'min(len(request.tokens) // self.block_size, request.publish_limit)'),
    Mutation('a match without blocks is kept', 'scheduler', 'self.pool.release(matched)', 'pass'),
    Mutation('all-position outputs match', 'scheduler',
             'if request.root is None or request.all_rows:', 'if request.root is None:'),
    Mutation('the salt is ignored', 'intake', 'root_key(given.salt, ', "root_key(b'', "),
    Mutation('the tenant is ignored', 'intake', 'given.tenant.encode(), given.adapter', "b'', given.adapter"),
    Mutation('keys do not chain', 'block_pool',
             'hashlib.blake2b(parent + tokens + media,', 'hashlib.blake2b(parent[:0] + tokens + media,'),
    Mutation('keys ignore tokens', 'block_pool',
             'hashlib.blake2b(parent + tokens + media,', 'hashlib.blake2b(parent + media,'),
    Mutation('poisoned blocks stay in the index', 'scheduler',
             'self.pool.withdraw(block)\n            request.publish_at', 'pass\n            request.publish_at'),
    Mutation('evicted blocks stay in the index', 'block_pool',
             'self._unindex(block)\n            refs[block] = 1', 'refs[block] = 1'),
    Mutation('a matched block stays evictable', 'block_pool',
             'del self._cached[block]\n            self._refs', 'pass\n            self._refs'),
    Mutation('a match takes no reference', 'block_pool', 'self._refs[block] += 1', 'pass'),
    Mutation('steady rows run out of their blocks', 'scheduler', ' and start < len(request.blocks) * block_size', ''),
    Mutation('steady rows do not publish', 'scheduler',
             ' and end < request.publish_at', ' and end < 10 * request.publish_at'),
    # groups, queue, outputs, grammar
    Mutation('a group leaves its blocks in the index', 'scheduler',
             'if group.root is not None:\n                self.pool.forget',
             'if False:\n                self.pool.forget'),
    Mutation('a group whose leader ends is stuck', 'groups',
             'self.leader = self.parked.pop(0) if self.parked else None', 'self.leader = None'),
    Mutation('first come, last served', 'waiting',
             'return self.tenants[self.ring[0]].queue[0]', 'return self.tenants[self.ring[0]].queue[-1]'),
    Mutation('rows of logits come again after a preemption', 'outputs',
             'first = max(request.rows_out, start)', 'first = start'),
    Mutation('tokens after a stop id are kept', 'scheduler',
             "finish = Finish('stop', stop_id=token)\n                break", "finish = Finish('stop', stop_id=token)"),
    Mutation('the grammar does not see tokens', 'scheduler', 'request.grammar.accept(token)', 'pass'),
    Mutation('the budget is exceeded', 'scheduler', 'spare -= todo\n', 'spare -= 1\n'),
    # pictures
    Mutation('rows do not wait for tiles', 'pictures',
             'if not picture.whole:\n                stop', 'if False:\n                stop'),
    Mutation('a picture is forgotten before the rows that read it', 'pictures',
             'self._read.append(images[request.image_at].digest)', 'self._release(images[request.image_at].digest)'),
    Mutation('part of a picture is kept', 'pictures', 'if not picture.whole or picture.lost:', 'if picture.lost:'),
    Mutation('more pictures than there is room for', 'pictures', 'while tokens > self.room.tokens - self.tokens:',
             'while False:'),
    Mutation('keys do not know pictures', 'request', "if self.images else b''", "if False else b''"),
    Mutation('requests wait for each other for ever', 'scheduler', 'if self._unblock():', 'if False:'),
    Mutation('the last token of a prompt is never a picture', 'scheduler', 'and start >= request.images_end', ''),
]


def essence(function):
    """What a function does, without where it stands."""
    code = function.__code__
    return code.co_code, code.co_names, [const for const in code.co_consts if not isinstance(const, types.CodeType)]


def apply(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchange the functions that differ in the mutated source, in their own classes and modules."""
    module = importlib.import_module(f'lmdeploy.engine.{mutation.module}')
    source = inspect.getsource(module)
    assert source.count(mutation.old) == 1, f'the source has changed: {mutation.old!r} is not there once'
    changed = types.ModuleType(module.__name__)
    exec(compile(source.replace(mutation.old, mutation.new), module.__file__, 'exec'), changed.__dict__)
    exchanged = 0
    for name, new in vars(changed).items():
        if getattr(new, '__module__', None) != module.__name__:
            continue
        old = getattr(module, name)
        pairs = [(old, new)] if not isinstance(new, type) else [
            (vars(old)[attribute], function) for attribute, function in vars(new).items()]
        for was, function in pairs:
            if isinstance(function, types.FunctionType) and essence(function) != essence(was):
                monkeypatch.setattr(was, '__code__', function.__code__)
                exchanged += 1
    assert exchanged, 'nothing changed'


@pytest.mark.parametrize('mutation', MUTATIONS, ids=lambda mutation: mutation.name)
def test_broken_rule_is_noticed(mutation, monkeypatch):
    logging.getLogger('lmdeploy').setLevel(logging.CRITICAL + 1)
    apply(mutation, monkeypatch)
    with pytest.raises(AssertionError, match=r'^seed \d+, turn \d+: '):
        simulate(SEEDS, TURNS)


def test_unbroken_rules_pass():
    report = simulate(SEEDS[:60], TURNS)
    assert report.preemptions and report.hit_tokens
    assert all(report.finishes[reason] for reason in ('stop', 'length', 'abort', 'error'))
