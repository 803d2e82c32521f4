"""The lab: throw-away libvirt hosts and guests for tests, demos and other projects' tests.

- :mod:`virt_sse.lab.host`: a private libvirt host in its own namespaces
- :mod:`virt_sse.lab.guests`: the guests of ``vm-images/``, built on first use, and how to drive one
- :mod:`virt_sse.lab.acceleration`: which guest can run under KVM on this machine
- :mod:`virt_sse.lab.vaults`: a throw-away key vault
- :mod:`virt_sse.lab.tokens`: throw-away PKCS#11 tokens
- :mod:`virt_sse.lab.agents`: the agent of a lab host
- :mod:`virt_sse.lab.pytest_plugin`: all of it as fixtures

It needs root, and touches nothing outside its own directories: not the machine's libvirt, not its
mounts, not its ``/dev/kvm``.
"""
