"""The contract suite of the package, with the benches of this folder."""

from virt_sse.contract.test_key_providers import *  # noqa: F403 -- all tests and fixtures
