"""Docker's API, version 1.40 to 1.50: :mod:`~cowfs.service.api.routing` has the way from a path to a handler, each other
module a table of routes whose handlers translate between requests and the parts of the service.

Source of paths, parameters and documents: moby's ``api/swagger.yaml`` and its version history.
"""
