"""The scripts here run in environments of their own; `--doctest-modules` would import them."""

collect_ignore_glob = ["make_*.py"]
