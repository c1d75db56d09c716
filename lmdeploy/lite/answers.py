"""Sample answers of two models, each asked in a process of its own, by the command that anybody would type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lmdeploy.config import env
from lmdeploy.lite.report import Answer

QUESTIONS = (
    'What is the capital of France, and what is it known for?',
    'Write a Python function that returns the n-th Fibonacci number.',
    '用两句话介绍一下长城。',
)
TOKENS = 48
SECONDS = 600


def compare_answers(before: Path, after: Path, device: str = 'auto') -> list[Answer]:
    """QUESTIONS to both models, greedily; an answer that failed is the error's last line."""
    sides = [[ask(path, question, device) for question in QUESTIONS] for path in (before, after)]
    return [Answer(*entry) for entry in zip(QUESTIONS, *sides)]


def ask(model: Path, question: str, device: str = 'auto') -> str:
    """What ``lmdeploy chat`` answers."""
    command = [sys.executable, '-m', 'lmdeploy', 'chat', str(model), '-q', question, '--temperature', '0',
               '--max-new-tokens', str(TOKENS), '--lang', 'en']  # fmt: skip
    if device == 'cpu':
        command += ['--backend', 'pytorch', '--device', 'cpu']
    root = str(Path(__file__).resolve().parents[2])
    try:
        out = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', errors='replace',
                             timeout=SECONDS, stdin=subprocess.DEVNULL,
                             env=env.child_environment(PYTHONPATH=root, PYTHONIOENCODING='utf-8'))  # fmt: skip
    except subprocess.TimeoutExpired:
        return f'(no answer within {SECONDS} s)'
    if out.returncode:
        return f'(failed: {(out.stderr.strip().splitlines() or ["no message"])[-1].strip()})'
    return out.stdout.strip()
