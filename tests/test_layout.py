"""The package obeys the laws of its layout."""

from __future__ import annotations

from pathlib import Path

from tools.check_layout import MAY_IMPORT, ROOTS, check

ROOT = Path(__file__).resolve().parent.parent


def test_no_law_is_broken():
    broken = [str(finding) for finding in check(ROOT) if finding.error]
    assert not broken, '\n'.join(broken)


def test_every_package_has_its_place():
    found = {path.name.removesuffix('.py') for path in (ROOT / 'lmdeploy').iterdir()
             if path.suffix == '.py' or path.is_dir() and any(path.glob('*.py'))}
    assert found <= set(MAY_IMPORT) | ROOTS
