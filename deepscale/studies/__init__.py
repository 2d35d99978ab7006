"""The published studies, and those that go further: `deepscale study NAME`. A study is data (study.py), not a script."""
