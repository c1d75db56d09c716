"""The command table, exit codes, languages, and what starting costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lmdeploy
from lmdeploy.cli import entrypoint
from lmdeploy.cli.args import UsageError
from lmdeploy.cli.entrypoint import COMMANDS, EXIT_CODES, Command, main
from lmdeploy.cli.screen import choose_language
from lmdeploy.errors import EngineDead, LmdeployError, LoadError, RequestError, SourceError, TemplateError

HEAVY = {'torch', 'transformers', 'rich', 'prompt_toolkit', 'numpy', 'tokenizers', 'huggingface_hub', 'jinja2'}


def run(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-m', 'lmdeploy', *argv], capture_output=True, text=True, timeout=60,
                          stdin=subprocess.DEVNULL, **options)


def modules_after(code: str) -> set[str]:
    out = subprocess.run([sys.executable, '-c', f'import sys\n{code}\nprint(*sys.modules, file=sys.stderr)'],
                         capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    return {name.partition('.')[0] for name in out.stderr.split()}


def cost(code: str, tries: int = 5) -> float:
    """Seconds of processor time that ``code`` takes beyond starting Python: a busy machine changes them little."""
    def once(source: str) -> float:
        process = subprocess.Popen([sys.executable, '-c', source], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    return min(once(code) for _ in range(tries)) - min(once('pass') for _ in range(tries))


def test_import_brings_nothing_heavy():
    assert not HEAVY & modules_after('import lmdeploy')


@pytest.mark.parametrize('argv', [['-h'], ['-v'], ['chat', '-h'], ['list', '-h'], ['pull', '-h'], ['rm', '-h'],
                                  ['check_env', '-h'], ['bench', '-h'], ['bench', 'throughput', '-h'], []])
def test_help_brings_nothing_heavy(argv):
    code = ('from lmdeploy.cli.entrypoint import main\n'
            f'try:\n    main({argv!r})\nexcept SystemExit as leave:\n    assert leave.code == 0')
    assert not HEAVY & modules_after(code)


def test_import_takes_less_than_50_ms():
    assert cost('import lmdeploy') < 0.05


def test_help_takes_less_than_200_ms():
    code = 'from lmdeploy.cli.entrypoint import main\ntry:\n    main(["-h"])\nexcept SystemExit:\n    pass'
    assert cost(code) < 0.2


def test_no_arguments_print_the_help_with_every_command():
    out = run()
    assert out.returncode == 0
    assert all(f'    {name} ' in out.stdout for name in COMMANDS)


@pytest.mark.parametrize('flag', ['-v', '--version'])
def test_version(flag):
    assert run(flag).stdout.strip() == lmdeploy.__version__


def test_an_unknown_command_names_those_that_exist():
    out = run('fly')
    assert out.returncode == 2
    assert all(name in out.stderr for name in COMMANDS)
    assert 'Traceback' not in out.stderr


@pytest.mark.parametrize('argv', [['--no-such-flag'], ['chat', '--tp', 'two'], ['pull'], ['rm'],
                                  ['--lang', 'fr', 'list'], ['--debug'], ['chat', '--backend', 'tensorrt']])
def test_wrong_usage_is_2_on_stderr(argv):
    out = run(*argv)
    assert (out.returncode, out.stdout) == (2, '')
    assert 'usage: lmdeploy' in out.stderr


@pytest.fixture
def command(monkeypatch):
    """A command whose ``run`` is whatever the test says."""
    import types

    module = types.ModuleType('lmdeploy_test_command')
    module.add_arguments = lambda parser: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(entrypoint.COMMANDS, 'probe', Command(module.__name__, 'a probe'))

    def set_run(behaviour):
        def run(args, screen):
            if isinstance(behaviour, BaseException):
                raise behaviour
            return behaviour

        module.run = run

    return set_run


@pytest.mark.parametrize('error, code', [
    (RequestError('LMD-302'), 1),
    (UsageError('LMD-404'), 2),
    (TemplateError('LMD-302'), 65),
    (LoadError('LMD-302'), 65),
    (SourceError('LMD-302'), 66),
    (EngineDead('LMD-302'), 70),
    (ValueError('surprise'), 70),
    (KeyboardInterrupt(), 130),
])
def test_errors_end_on_one_screen_with_their_exit_code(command, capsys, error, code):
    command(error)
    assert main(['--lang', 'en', 'probe']) == code
    out, err = capsys.readouterr()
    assert out == '' and 'Traceback' not in err
    if isinstance(error, LmdeployError):
        assert err.startswith(f'error {error.code}\n  ')
    elif isinstance(error, ValueError):
        assert err.startswith('error LMD-401\n') and 'ValueError: surprise' in err
    else:
        assert err == ''


def test_every_error_class_has_an_exit_code():
    import lmdeploy.errors as errors

    classes = {value for value in vars(errors).values()
               if isinstance(value, type) and issubclass(value, LmdeployError) and value is not LmdeployError}
    assert classes <= set(EXIT_CODES)


def test_debug_shows_the_traceback(command, capsys):
    command(ValueError('surprise'))
    assert main(['probe', '--debug']) == 70
    assert 'Traceback' in capsys.readouterr().err


def test_the_exit_code_of_the_command_is_passed_on(command):
    command(7)
    assert main(['probe']) == 7


def test_a_reader_that_goes_away_is_quiet():
    shell = f'{sys.executable} -m lmdeploy list | true; exit ${{PIPESTATUS[0]}}'
    for _ in range(3):  # whether the pipe breaks is a race; what may not happen is noise
        out = subprocess.run(['bash', '-c', shell], capture_output=True, text=True, timeout=60)
        assert out.returncode in (0, 141)
        assert 'Traceback' not in out.stderr and 'Exception ignored' not in out.stderr


@pytest.mark.parametrize('option, variable, locale, language', [
    ('zh', 'en', 'en_GB.UTF-8', 'zh'),
    (None, 'zh', 'en_GB.UTF-8', 'zh'),
    (None, 'en', 'zh_CN.UTF-8', 'en'),
    (None, '', 'zh_CN.UTF-8', 'zh'),
    (None, '', 'de_DE.UTF-8', 'en'),
    (None, '', 'C', 'en'),
])
def test_language_is_option_then_variable_then_locale(monkeypatch, option, variable, locale, language):
    for name in ('LC_ALL', 'LC_MESSAGES'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('LMDEPLOY_LANG', variable)
    monkeypatch.setenv('LANG', locale)
    assert choose_language(option) == language


@pytest.mark.parametrize('argv', [['--lang', 'zh', 'probe'], ['probe', '--lang', 'zh']])
def test_errors_are_told_in_the_language_asked_for(command, capsys, argv):
    command(RequestError('LMD-302'))
    main(argv)
    assert '提示词为空' in capsys.readouterr().err
