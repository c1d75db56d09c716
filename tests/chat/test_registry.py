"""The registry behaves as users of MODELS know it."""

from __future__ import annotations

import pytest

from lmdeploy.chat.registry import Registry


class First:
    pass


class Second:
    pass


def test_names_of_every_form():
    registry = Registry('things')

    @registry.register_module(name='one')
    @registry.register_module(name=['two', 'three'])
    class Decorated:
        pass

    assert registry.register_module('four', module=First) is First
    registry.register_module(module=Second)
    assert list(registry.module_dict) == ['two', 'three', 'one', 'four', 'Second']
    assert registry.get('one') is registry.get('three') is Decorated
    assert registry.get('absent') is None
    assert 'four' in registry and 'absent' not in registry and len(registry) == 5
    assert 'things' in repr(registry) and 'four' in repr(registry)


def test_a_name_is_given_once_unless_forced():
    registry = Registry('things')
    registry.register_module('a', module=First)
    with pytest.raises(KeyError, match='a is already registered in things'):
        registry.register_module(['b', 'a'], module=Second)
    assert 'b' not in registry, 'nothing is registered by half'
    registry.register_module('a', force=True, module=Second)
    assert registry.get('a') is Second


def test_wrong_types():
    registry = Registry('things')
    with pytest.raises(TypeError):
        registry.register_module('a', module=3)
    with pytest.raises(TypeError):
        registry.register_module(name=[3])
    with pytest.raises(TypeError):
        registry.register_module('a', force='yes')
