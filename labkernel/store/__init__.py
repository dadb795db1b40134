"""Where things lie on disk: layout, content-addressed blobs, the metadata database, locks."""
