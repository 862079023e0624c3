"""Campaigns against files, commands and operators: ``python -m bench.attack``, see :mod:`bench.attack.__main__`."""
