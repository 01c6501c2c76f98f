"""Alembic's scripts: one for each schema of the catalogue."""
