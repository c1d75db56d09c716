"""``lmdeploy serve proxy``: its options, and what is wrong with them."""

from __future__ import annotations

import argparse

import pytest

from lmdeploy.cli.entrypoint import main
from lmdeploy.cli.proxy import STRATEGIES, add_arguments
from lmdeploy.serve.proxy import strategies

FLAGS = """--server-name --server-port --serving-strategy --routing-strategy --disable-cache-status --migration-protocol
 --link-type --disable-gdr --api-keys --ssl --log-level""".split()


def test_the_flags_of_lmdeploy_are_there(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert set(FLAGS) <= known
    assert parser.get_default('server_port') == 8000
    assert parser.get_default('routing_strategy') == 'min_expected_latency'
    with pytest.raises(SystemExit):
        main(['serve', 'proxy', '-h'])
    assert 'prefix_affinity' in capsys.readouterr().out


def test_the_strategies_are_those_of_the_proxy():
    """Named twice, so that help needs no import of the server."""
    assert set(STRATEGIES) == set(strategies.STRATEGIES)


@pytest.mark.parametrize(('argv', 'code', 'text'), [
    (['--serving-strategy', 'DistServe'], 78, 'LMD-527'),
    (['--heartbeat-seconds', '0'], 78, 'LMD-527'),
    (['--node-timeout', 'nan'], 78, 'LMD-527'),
    (['--allowed-nodes', '10.0.0.1/8'], 78, '--allowed-nodes'),
    (['--limit', 'x=1'], 78, 'LMD-527'),
    (['--request-timeout', '0'], 78, 'LMD-527'),
    (['--api-keys-file', '/none'], 78, 'LMD-528'),
    (['--node-key', ' '], 78, 'LMD-527'),
    (['--ssl'], 78, 'LMD-503'),
    (['--server-port', '70000'], 98, 'LMD-502'),
])
def test_wrong_options_end_on_one_screen(capsys, monkeypatch, argv, code, text):
    monkeypatch.delenv('SSL_KEYFILE', raising=False)
    assert main(['serve', 'proxy', *argv, '--lang', 'en']) == code
    assert text in capsys.readouterr().err


def test_a_broken_file_of_nodes(capsys, monkeypatch, tmp_path):
    import socket

    monkeypatch.setenv('LMDEPLOY_CACHE', str(tmp_path))
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / 'proxy' / f'{port}.json'
    path.parent.mkdir()
    path.write_text('nonsense')
    assert main(['serve', 'proxy', '--server-port', str(port), '--lang', 'zh']) == 78
    said = capsys.readouterr().err
    assert 'LMD-571' in said and str(path) in said
    assert path.read_text() == 'nonsense'
