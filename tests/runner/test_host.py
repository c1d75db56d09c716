"""Memory and processors inside a container, on made-up cgroup folders."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.runner import host


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace('__', '/').replace('_DOT_', '.')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_free_memory_is_positive_and_below_the_total():
    free, total = host.free_host_memory()
    assert 0 < free <= total


def test_cgroup_v2_limit_counts_file_pages_as_free(tmp_path):
    write(tmp_path, memory_DOT_max='1000000\n', memory_DOT_current='600000\n',
          memory_DOT_stat='anon 1\ninactive_file 250000\n')  # fmt: skip
    assert host._memory_limits(tmp_path) == [(1000000, 350000)]


def test_cgroup_v1_limit(tmp_path):
    write(tmp_path, memory__memory_DOT_limit_in_bytes='5000', memory__memory_DOT_usage_in_bytes='3000')
    assert host._memory_limits(tmp_path) == [(5000, 3000)]


@pytest.mark.parametrize('text', ['max', '', 'nonsense'])
def test_no_limit(tmp_path, text):
    write(tmp_path, memory_DOT_max=text, memory_DOT_current='1', cpu_DOT_max=f'{text} 100000')
    assert host._memory_limits(tmp_path) == []
    assert host._cpu_quota(tmp_path) is None


def test_cpu_quota_is_rounded_up_to_whole_processors(tmp_path):
    write(tmp_path, cpu_DOT_max='150000 100000')
    assert host._cpu_quota(tmp_path) == 2
    write(tmp_path, cpu_DOT_max='20000 100000')
    assert host._cpu_quota(tmp_path) == 1


def test_threads_are_only_ever_reduced(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(host, '_cpu_quota', lambda: before + 5)
        assert host.limit_threads() == before == torch.get_num_threads()
        monkeypatch.setattr(host, '_cpu_quota', lambda: 1)
        assert host.limit_threads() == 1 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
