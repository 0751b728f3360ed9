"""No package to import: this file keeps pytest's two conftest.py (here and in tests/) apart by
name."""
