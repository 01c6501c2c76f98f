"""How Alembic reaches the catalogue: on the connection that `catalogue_migrate` has open, in its transaction."""

from alembic import context

from storage.catalogue_schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
