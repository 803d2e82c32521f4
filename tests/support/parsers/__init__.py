"""The parsers of foreign bytes, for fuzzing (:mod:`support.fuzzing`)."""

from support.parsers import connections, documents, domains, images, vaults

PARSERS = (*images.PARSERS, *domains.PARSERS, *documents.PARSERS, *connections.PARSERS, *vaults.PARSERS)
