"""``python -m lmdeploy``: the command line, where no script directory is on the path."""

from lmdeploy.cli.entrypoint import main

if __name__ == '__main__':
    raise SystemExit(main())
