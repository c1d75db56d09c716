"""The loop of ``lmdeploy chat`` over a frontend that answers by script."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from lmdeploy.cli.conversation import Conversation
from lmdeploy.cli.repl import Repl
from lmdeploy.cli.screen import Screen, printable
from lmdeploy.cli.settings import Settings
from lmdeploy.errors import EngineDead, RequestError
from lmdeploy.frontend.frontend import RequestOutput
from lmdeploy.messages import GenerationConfig


class ScriptedFrontend:
    """Answers ``echo: <question>`` word by word; ``long``, ``fail``, ``die`` and ``hang`` do what they say."""

    capacity = SimpleNamespace(vocab_size=1000)

    def __init__(self) -> None:
        self.prompts: list[list[dict]] = []
        self.gens: list[GenerationConfig] = []
        self.closed = 0

    async def generate(self, prompt, gen):
        self.prompts.append(prompt.messages)
        self.gens.append(gen)
        question = prompt.messages[-1]['content']
        try:
            if question == 'fail':
                yield RequestOutput('', [], 5, 0, finish_reason='error', error=RequestError('LMD-302'))
                return
            if question == 'die':
                yield RequestOutput('', [], 5, 0, finish_reason='error', error=EngineDead('LMD-302'))
                return
            words = f'echo: {question}'.split(' ')
            for i, word in enumerate(words):
                yield RequestOutput((' ' if i else '\n ') + word, [i], 5, i + 1)
                if question == 'hang':
                    await asyncio.sleep(60)
            yield RequestOutput('', [], 5, len(words), finish_reason='length' if question == 'long' else 'stop')
        finally:
            self.closed += 1


class Lines:
    """A reader over a list; an exception in it is raised."""

    def __init__(self, *lines) -> None:
        self.lines = list(lines)

    def read(self):
        line = self.lines.pop(0) if self.lines else None
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def frontend():
    return ScriptedFrontend()


@pytest.fixture
def build(frontend):
    made = []

    def build(lang='en', terminal=False, interactive=True, verbose=False):
        settings = Settings(GenerationConfig(do_sample=True), verbose)
        made.append(Conversation(frontend, settings.gen))
        return Repl(made[-1], settings, Screen(lang), terminal=terminal, interactive=interactive)

    yield build
    for conversation in made:
        conversation.close()


def said(messages: list[dict]) -> list[tuple[str, str]]:
    return [(m['role'], m['content']) for m in messages]


def test_answers_are_on_stdout_and_remembered(build, frontend, capsys):
    assert build().run(Lines('one', '', 'two')) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ('echo: one\necho: two\n', '')
    assert said(frontend.prompts[1]) == [('user', 'one'), ('assistant', '\n echo: one'), ('user', 'two')]


@pytest.mark.parametrize('word', ['/reset', 'end'])
def test_reset_forgets(build, frontend, capsys, word):
    build().run(Lines('one', word, 'two'))
    assert said(frontend.prompts[1]) == [('user', 'two')]
    assert 'forgotten' in capsys.readouterr().err


@pytest.mark.parametrize('word', ['/exit', 'exit', ' exit '])
def test_exit_leaves(build, frontend, word):
    assert build().run(Lines(word, 'never asked')) == 0
    assert frontend.prompts == []


def test_system_prompt(build, frontend, capsys):
    build().run(Lines('/system', '/system Be brief.', 'one', '/system', '/system off', 'two'))
    assert said(frontend.prompts[0]) == [('system', 'Be brief.'), ('user', 'one')]
    assert frontend.prompts[1][0]['role'] == 'user'
    assert capsys.readouterr().err.count('Be brief.') == 2


def test_set_changes_the_next_answer(build, frontend, capsys):
    build().run(Lines('/set temperature=0.2 max_new_tokens=7 stop_words=["a","b"] verbose=on', 'one', '/set'))
    gen = frontend.gens[0]
    assert (gen.temperature, gen.max_new_tokens, gen.stop_words) == (0.2, 7, ['a', 'b'])
    err = capsys.readouterr().err
    assert 'tokens/s]' in err
    assert 'temperature=0.2\n' in err and 'stop_words=["a","b"]\n' in err and 'verbose=true\n' in err


def test_set_shows_what_it_changed_and_nothing_else(build, capsys):
    build().run(Lines('/set temperature=0.2 top_p=0.5'))
    assert capsys.readouterr().err == 'temperature=0.2\ntop_p=0.5\n'


@pytest.mark.parametrize('assignment, code', [
    ('colour=blue', 'LMD-402'), ('temperature=warm', 'LMD-403'), ('temperature=9', 'LMD-310'),
    ('temperature', 'LMD-403'), ('verbose=3', 'LMD-403'), ('top_k=1.5', 'LMD-310'), ('stop_words=3', 'LMD-311'),
    ('temperature=NaN', 'LMD-310'),
])
def test_a_wrong_setting_changes_nothing(build, frontend, capsys, assignment, code):
    build().run(Lines(f'/set top_p=0.5 {assignment}', 'one'))
    assert f'error {code}' in capsys.readouterr().err
    assert frontend.gens[0] == GenerationConfig(do_sample=True)


def test_settings_print_in_the_form_that_set_takes():
    settings = Settings(GenerationConfig(do_sample=True, temperature=0.3, random_seed=None, stop_words=['x y']), True)
    assert Settings(GenerationConfig()).change(settings.lines(), 1000) == settings


def test_unknown_commands_are_not_asked(build, frontend, capsys):
    build().run(Lines('/what is this', ' /not a command'))
    assert 'LMD-407' in capsys.readouterr().err
    assert said(frontend.prompts[0]) == [('user', ' /not a command')]


def test_a_failed_turn_is_told_and_forgotten(build, frontend, capsys):
    assert build(lang='zh').run(Lines('fail', 'one')) == 0
    assert '错误 LMD-302' in capsys.readouterr().err
    assert said(frontend.prompts[1]) == [('user', 'one')]


def test_over_a_pipe_a_failed_turn_shows_in_the_exit_code(build):
    assert build(interactive=False).run(Lines('fail', 'one')) == 1


def test_a_dead_engine_ends_the_loop(build, frontend):
    with pytest.raises(EngineDead):
        build().run(Lines('die', 'one'))
    assert len(frontend.prompts) == 1


def test_a_cut_answer_says_so(build, capsys):
    build().run(Lines('long'))
    assert 'cut off after 2 tokens' in capsys.readouterr().err


def interrupting_stdout(monkeypatch):
    """An interrupt arrives while an answer is being printed."""
    import sys

    write = sys.stdout.write

    def interrupt(text):
        write(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, 'write', interrupt)
    return write


def test_an_interrupt_stops_the_answer_and_keeps_the_session(build, frontend, capsys, monkeypatch):
    repl = build()
    with monkeypatch.context() as patch:
        interrupting_stdout(patch)
        patch.setattr('builtins.print', lambda *args, **kwargs: None)
        repl.take('hang')
    assert frontend.closed == 1  # the generator was closed, which aborts the request
    repl.take('two')
    assert said(frontend.prompts[1]) == [('user', 'hang'), ('assistant', '\n echo:'), ('user', 'two')]


def test_an_interrupt_without_a_person_ends_the_loop(build, monkeypatch):
    repl = build(interactive=False)
    with monkeypatch.context() as patch:
        interrupting_stdout(patch)
        patch.setattr('builtins.print', lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            repl.run(Lines('hang', 'two'))


def test_an_interrupt_at_the_prompt_drops_the_line(build, capsys):
    assert build().run(Lines(KeyboardInterrupt(), 'one')) == 0
    out, err = capsys.readouterr()
    assert out == 'echo: one\n' and 'Ctrl-D' in err


def test_a_question_that_looks_like_a_command_can_be_asked_once(build, frontend):
    build().ask('/set of integers?')
    assert said(frontend.prompts[0]) == [('user', '/set of integers?')]


def test_control_characters_do_not_reach_the_terminal(build, capsys):
    assert printable('a\x1b[2Jb\x07\tc\n\x9b0m\x7f') == 'a[2Jb\tc\n0m'
    build(terminal=True).ask('\x1b]0;title\x07')
    build(terminal=False).ask('\x1b]0;title\x07')
    out = capsys.readouterr().out
    assert out == 'echo: ]0;title\necho: \x1b]0;title\x07\n'
    Screen('en').error(RequestError('LMD-303', given='\x1b[2J'))
    assert '\x1b' not in capsys.readouterr().err


def test_help_lists_every_command(build, capsys):
    repl = build(lang='zh')
    repl.take('/help')
    err = capsys.readouterr().err
    assert all(name in err for name in repl.commands)
