"""The lab: throw-away libvirt hosts and guests for tests, demos and other projects' tests.

- :mod:`virt_sse.lab.host`: a private libvirt host in its own namespaces
- :mod:`virt_sse.lab.guests`: drives the guests of ``vm-images/``
- :mod:`virt_sse.lab.recipes`: builds the guests of ``vm-images/`` on first use
- :mod:`virt_sse.lab.acceleration`: probes the guests' support for KVM on this machine
- :mod:`virt_sse.lab.vaults`: a throw-away key vault
- :mod:`virt_sse.lab.tokens`: throw-away PKCS#11 tokens
- :mod:`virt_sse.lab.ceph`: a throw-away Ceph cluster
- :mod:`virt_sse.lab.agents`: the agent of a lab host
- :mod:`virt_sse.lab.pytest_plugin`: the lab as pytest fixtures

The lab needs root. It changes nothing outside its own directories: not the machine's libvirt, not its
mounts, not its ``/dev/kvm``.
"""
