"""``python -m stepinfluence``: the same as the ``sdi`` command."""

from stepinfluence.app.cli import main

if __name__ == "__main__":
    main()
