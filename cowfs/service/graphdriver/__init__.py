"""A graph driver plugin for dockerd 20.10 to 27 on a store (Docker removed such plugins in 28).

:mod:`shown` has the directories that dockerd looks into, :mod:`layers` the verbs, :mod:`plugin` the door: HTTP with JSON at a unix
socket (docker/cli, docs/extend/plugins_graphdriver.md; moby, daemon/graphdriver/proxy.go).
"""
